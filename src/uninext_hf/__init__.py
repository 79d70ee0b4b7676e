"""UNINEXT for Hugging Face Transformers: one model that finds instances in pictures and video."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForZeroShotObjectDetection, AutoProcessor

from .configuration_uninext import PRESETS, UninextConfig
from .image_processing_uninext import UninextImageProcessor
from .instances_uninext import Instances
from .modeling_uninext import (
    UninextForUniversalPerception,
    UninextImageFeatures,
    UninextModel,
    UninextOutput,
    UninextPreTrainedModel,
    UninextPromptFeatures,
)
from .processing_uninext import UninextProcessor
from .prompt_uninext import Prompt
from .task_uninext import TASKS, Task

__version__ = "0.1.0.dev0"

# transformers has no plug-in mechanism: its Auto classes know us once this package is imported.
AutoConfig.register(UninextConfig.model_type, UninextConfig, exist_ok=True)
AutoModel.register(UninextConfig, UninextModel, exist_ok=True)
AutoModelForZeroShotObjectDetection.register(UninextConfig, UninextForUniversalPerception, exist_ok=True)
AutoImageProcessor.register(
    UninextConfig, image_processor_classes={"torchvision": UninextImageProcessor}, exist_ok=True
)
AutoProcessor.register(UninextConfig, UninextProcessor, exist_ok=True)

__all__ = [
    "PRESETS",
    "TASKS",
    "Instances",
    "Prompt",
    "Task",
    "UninextConfig",
    "UninextForUniversalPerception",
    "UninextImageFeatures",
    "UninextImageProcessor",
    "UninextModel",
    "UninextOutput",
    "UninextPreTrainedModel",
    "UninextProcessor",
    "UninextPromptFeatures",
]
