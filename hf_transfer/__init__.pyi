from .compare import CompareRecipe
from .data.teacher_tokens import TeacherCollator, add_teacher_tokens
from .data.text import TextData
from .depth import block_names, embedding_names, head_names, parameter_depths
from .distill import DistillationRecipe
from .errors import ConfigurationError
from .features import PrefixCache, extract_features
from .heads import add_mean_pooling, fit_head
from .models import ModelSpec, load_model, load_tokenizer, load_trained
from .objectives import (
    L2SP,
    AttentionMatching,
    CrossTokenizerDistillation,
    Distillation,
    HiddenStateMatching,
    Objective,
    StoredDistillation,
)
from .recipe import (
    FeatureExtractionRecipe,
    FineTuneRecipe,
    GradualUnfreezeRecipe,
    LoraRecipe,
    Recipe,
)
from .schedules import GradualUnfreeze, Ramp, SlantedTriangular, TopLevels
from .students import layer_map, student_from
from .teacher_store import TeacherStore
from .training.distillation import DistillationTrainer
from .training.named import FeatureExtractionTrainer, GradualUnfreezeTrainer
from .training.rates import LearningRateBands
from .training.trainer import TransferTrainer
from .vocabularies import shared_vocabulary

__all__ = [
    "L2SP",
    "AttentionMatching",
    "CompareRecipe",
    "ConfigurationError",
    "CrossTokenizerDistillation",
    "Distillation",
    "DistillationRecipe",
    "DistillationTrainer",
    "FeatureExtractionRecipe",
    "FeatureExtractionTrainer",
    "FineTuneRecipe",
    "GradualUnfreeze",
    "GradualUnfreezeRecipe",
    "GradualUnfreezeTrainer",
    "HiddenStateMatching",
    "LearningRateBands",
    "LoraRecipe",
    "ModelSpec",
    "Objective",
    "PrefixCache",
    "Ramp",
    "Recipe",
    "SlantedTriangular",
    "StoredDistillation",
    "TeacherCollator",
    "TeacherStore",
    "TextData",
    "TopLevels",
    "TransferTrainer",
    "add_mean_pooling",
    "add_teacher_tokens",
    "block_names",
    "embedding_names",
    "extract_features",
    "fit_head",
    "head_names",
    "layer_map",
    "load_model",
    "load_tokenizer",
    "load_trained",
    "parameter_depths",
    "shared_vocabulary",
    "student_from",
]

__version__: str
