"""Factor rules: for every op, its loop factors, and from them the ways to run it on one mesh axis.

`strategies` and `refusals` are the questions to ask; `register_rule` adds a rule for an op of the user's own.
"""

# Each of these files registers its rules as it is imported.
import autopar.sharding.rules.attention
import autopar.sharding.rules.conv
import autopar.sharding.rules.creation
import autopar.sharding.rules.experts
import autopar.sharding.rules.indexing
import autopar.sharding.rules.losses
import autopar.sharding.rules.matmul
import autopar.sharding.rules.norms
import autopar.sharding.rules.patches
import autopar.sharding.rules.pointwise
import autopar.sharding.rules.recurrent
import autopar.sharding.rules.reductions
import autopar.sharding.rules.views  # noqa: F401
from autopar.sharding.rules.registry import register_rule
from autopar.sharding.rules.table import has_rule, op_factors, refusals, strategies, strategies_with

__all__ = ["has_rule", "op_factors", "refusals", "register_rule", "strategies", "strategies_with"]
