"""Factor rules: for every op, its loop factors, and from them the ways to run it on one mesh axis.

`strategies` and `refusals` are the questions to ask; `register_rule` adds a rule for an op of the user's own.
"""

from autopar.sharding.rules.registry import register_rule
from autopar.sharding.rules.table import has_rule, op_factors, refusals, strategies, strategies_with

__all__ = ["has_rule", "op_factors", "refusals", "register_rule", "strategies", "strategies_with"]
