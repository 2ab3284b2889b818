"""Building blocks: learned rational activations (GR-KAN), low-rank adapters and routers."""

from jaxskip.nn.gr_kan import GRKAN, GroupRational, fit_rational, rational_decay_mask, variance_gain
from jaxskip.nn.lora import init_lora, merge_lora, train_labels
from jaxskip.nn.router import init_routers, keep_probability

__all__ = [
    "GRKAN",
    "GroupRational",
    "fit_rational",
    "init_lora",
    "init_routers",
    "keep_probability",
    "merge_lora",
    "rational_decay_mask",
    "train_labels",
    "variance_gain",
]
