# The front door: the names of `import ftbook as ft`, and where each one lives.
from .choose.recommend import recommend as recommend
from .data.read import read_rows as read_rows
from .fewshot.classifier import FewShotClassifier as FewShotClassifier
from .fewshot.exchange import load_classifier as load_classifier
from .memory.plan import plan as plan
from .merging.engine import merge as merge
from .methods.bitfit import BitFit as BitFit
from .methods.bottleneck_method import Bottleneck as Bottleneck
from .methods.files import load_adapter as load_adapter
from .methods.files import save_adapter as save_adapter
from .methods.fold import merge_ as merge_
from .methods.fold import remove_ as remove_
from .methods.fold import unmerge_ as unmerge_
from .methods.ia3 import IA3 as IA3
from .methods.lora_method import LoRA as LoRA
from .methods.p_tuning import PTuning as PTuning
from .methods.prefix_tuning import PrefixTuning as PrefixTuning
from .methods.prompt_tuning import PromptTuning as PromptTuning
from .methods.quant import quantize_ as quantize_
from .models.load import load_encoder as load_encoder
from .models.load import load_model as load_model
from .models.load import load_tokenizer as load_tokenizer
from .problem import Problem as Problem
from .quality.audit import audit as audit
from .recipe.config import DataKeys as DataKeys
from .recipe.config import load_recipe as load_recipe
from .recipe.preflight import check as check
from .recipe.run import quickstart as quickstart
from .recipe.run import run as run
from .training.settings import Settings as Settings
from .use.chat import chat as chat
from .use.evaluate import evaluate as evaluate
from .use.export import export as export
from .use.rows import finetune as finetune

__version__: str
