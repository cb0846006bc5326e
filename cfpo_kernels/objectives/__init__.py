"""The named objectives. Each is a dataclass in a file of its own, and a line here."""

from .aspo import ASPO as ASPO
from .base import Objective as Objective
from .cfpo import CFPO as CFPO
from .cispo import CISPO as CISPO
from .dppo import DPPO as DPPO
from .dro import DRO as DRO
from .gppo import GPPO as GPPO
from .icepop import IcePop as IcePop
from .ipo import IPO as IPO
from .power_is import PowerIS as PowerIS
from .ppo_clip import PPOClip as PPOClip
from .reinforce import Reinforce as Reinforce
from .sapo import SAPO as SAPO
from .topr import TOPR as TOPR
from .triton import register_triton_objective as register_triton_objective

# By name: every objective that is imported above.
OBJECTIVES: dict[str, type[Objective]] = {
    found.name: found
    for found in list(globals().values())
    if isinstance(found, type) and issubclass(found, Objective) and found is not Objective
}
