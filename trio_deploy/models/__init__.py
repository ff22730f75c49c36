"""What differs between model families: weight names, sizes, image layout. Data, one file each."""

from trio_deploy.models.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from trio_deploy.models.names import canonical_tensors, map_checkpoint_names
from trio_deploy.models.parse import parse_config
from trio_deploy.models.preprocessing import Preprocessor, ProcessedImage

__all__ = [
    "ModelConfig",
    "Preprocessor",
    "ProcessedImage",
    "RopeConfig",
    "TextConfig",
    "VisionConfig",
    "canonical_tensors",
    "map_checkpoint_names",
    "parse_config",
]
