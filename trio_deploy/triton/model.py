"""Where Triton repositories written before 0.2 look for their model."""

from trio_deploy.serve.triton_server.model import TritonPythonModel as TritonPythonModel
