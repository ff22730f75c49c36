# A Triton container with trio-deploy in the Python of its python backend. Not built in our tests,
# which run Triton 2.51 from PyPI.
#     docker build -f deploy/triton.Dockerfile -t trio-triton .
# For engines of TensorRT add the extra `tensorrt`, in the version that built them. Releases before
# 26.07 have known holes (NVIDIA's security bulletins 5816 to 5875, of 2026): do not go below.
# Both must be of one CUDA: this release has CUDA 13.4 (its release notes; 13 since 25.08), and PyPI's
# onnxruntime-gpu is built for CUDA 13 since 1.27 (up to 1.26 for CUDA 12). The pair was not tried.
FROM nvcr.io/nvidia/tritonserver:26.10-py3
COPY . /opt/trio-deploy
ENV PIP_BREAK_SYSTEM_PACKAGES=1
# With numpy 2 the outputs of older python backends arrive empty.
RUN pip install --no-cache-dir "/opt/trio-deploy[gpu]" "onnxruntime-gpu>=1.27" "numpy<2"
