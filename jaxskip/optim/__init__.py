"""Update rules as Optax transformations, and the curvature estimators they share."""

from jaxskip.optim.curvature import gnb_diag as gnb_diag
from jaxskip.optim.curvature import hutchinson_diag as hutchinson_diag
from jaxskip.optim.curvature import sampled_gnb_diag as sampled_gnb_diag
from jaxskip.optim.sophia import ScaleBySophiaState as ScaleBySophiaState
from jaxskip.optim.sophia import scale_by_sophia as scale_by_sophia
from jaxskip.optim.sophia import sophia as sophia
from jaxskip.optim.sophia import sophia_win_rate as sophia_win_rate
from jaxskip.optim.sophia import update_hessian as update_hessian
