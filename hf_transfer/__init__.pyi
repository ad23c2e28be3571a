from .adapt import DomainAdversarialRecipe, DomainAlignmentRecipe
from .adapters import BottleneckConfig
from .compare import CompareRecipe
from .data.domains import DomainPairs, DomainStream
from .data.spec import DataSpec
from .data.teacher_tokens import TeacherCollator, add_teacher_tokens
from .depth import block_names, embedding_names, head_names, parameter_depths
from .distill import DistillationRecipe
from .errors import ConfigurationError
from .features import PrefixCache, extract_features
from .heads import add_mean_pooling, fit_head
from .models import ModelSpec, load_model, load_processor, load_tokenizer, load_trained
from .objectives import (
    CORAL,
    L2SP,
    MMD,
    AttentionMatching,
    ConditionalAdversarial,
    CrossTokenizerDistillation,
    Distillation,
    DomainAdversarial,
    HiddenStateMatching,
    JointMMD,
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
from .training.domains import DomainAdversarialTrainer, DomainAlignmentTrainer
from .training.named import FeatureExtractionTrainer, GradualUnfreezeTrainer
from .training.rates import LearningRateBands
from .training.trainer import TransferTrainer
from .vocabularies import shared_vocabulary

__all__ = [
    "CORAL",
    "L2SP",
    "MMD",
    "AttentionMatching",
    "BottleneckConfig",
    "CompareRecipe",
    "ConditionalAdversarial",
    "ConfigurationError",
    "CrossTokenizerDistillation",
    "Distillation",
    "DistillationRecipe",
    "DistillationTrainer",
    "DomainAdversarial",
    "DomainAdversarialRecipe",
    "DomainAdversarialTrainer",
    "DomainAlignmentRecipe",
    "DomainAlignmentTrainer",
    "DomainPairs",
    "DomainStream",
    "FeatureExtractionRecipe",
    "FeatureExtractionTrainer",
    "FineTuneRecipe",
    "GradualUnfreeze",
    "GradualUnfreezeRecipe",
    "GradualUnfreezeTrainer",
    "HiddenStateMatching",
    "JointMMD",
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
    "DataSpec",
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
    "load_processor",
    "load_tokenizer",
    "load_trained",
    "parameter_depths",
    "shared_vocabulary",
    "student_from",
]

__version__: str
