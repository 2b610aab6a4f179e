"""H2Rec and the models that it is compared with."""

from h2rec.models.base import SequentialModel
from h2rec.models.h2rec import H2Rec
from h2rec.models.registry import MODELS, build_model, model_settings
from h2rec.models.single_branch import SingleBranch

__all__ = ["MODELS", "H2Rec", "SequentialModel", "SingleBranch", "build_model", "model_settings"]
