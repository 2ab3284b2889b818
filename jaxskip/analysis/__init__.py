"""Measurements of networks and of their training."""

from jaxskip.analysis.sharpness import HessianEigenpairs as HessianEigenpairs
from jaxskip.analysis.sharpness import best_local_step as best_local_step
from jaxskip.analysis.sharpness import directional_sharpness as directional_sharpness
from jaxskip.analysis.sharpness import hessian_eigenpairs as hessian_eigenpairs
from jaxskip.analysis.sharpness import hvp as hvp
from jaxskip.analysis.sharpness import landscape_search as landscape_search
from jaxskip.analysis.sharpness import update_report as update_report
from jaxskip.analysis.softmax_collapse import nlm_alignment as nlm_alignment
from jaxskip.analysis.softmax_collapse import softmax_collapse_fraction as softmax_collapse_fraction
from jaxskip.analysis.softmax_collapse import zero_loss_fraction as zero_loss_fraction
