"""What torch.compile makes one kernel of in a block, and what that takes and keeps."""

from __future__ import annotations

from autopar.cost_models.compute import kernel_time_s, memory_bandwidth
from autopar.cost_models.op_kinds import OpKind, op_kind
from autopar.graph.model_graph import Op
from autopar.sharding.joint import Placement
from autopar.simulate.class_costs import ClassCosts


class FusedGroups:
    """Chains of pointwise ops and reductions as torch.compile fuses them: each chain reads and writes once.

    Two ops that share a tensor are fused where the same number of products, attentions and other unfusable ops lies
    before both, so that no cycle can arise. Inside a group nothing is saved: the backward computes it again from the
    group's inputs.
    """

    def __init__(self, costs: ClassCosts) -> None:
        self.costs = costs
        cls = costs.cls
        depth: dict[str, int] = {}
        parent: dict[str, str] = {}

        def find(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        level_of: dict[str, int] = {}
        for op in cls.ops:
            kind = op_kind(op.target)
            fusible = kind in (OpKind.POINTWISE, OpKind.REDUCTION)
            level = max((depth.get(name, 0) for name in op.operands), default=0)
            level += 0 if fusible or kind in (OpKind.VIEW, OpKind.CREATION) else 1
            for output in op.outputs:
                depth[output] = level
            if not fusible:
                continue
            parent[op.name], level_of[op.name] = op.name, level
            for name in op.operands:
                producer = cls.producer.get(costs.root(name))
                if producer is not None and level_of.get(producer.name) == level:
                    parent[find(producer.name)] = find(op.name)
        members: dict[str, list[Op]] = {}
        for op in cls.ops:
            if op.name in parent:
                members.setdefault(find(op.name), []).append(op)
        self.groups = {root: ops for root, ops in members.items() if len(ops) > 1}
        self.group_of = {op.name: root for root, ops in self.groups.items() for op in ops}
        self._readers: dict[str, set[str]] = {}
        for op in cls.ops:
            for name in op.operands:
                self._readers.setdefault(costs.root(name), set()).add(self.group_of.get(op.name, op.name))
        self._outputs = {costs.root(name) for name in cls.outputs}

    def is_internal(self, name: str) -> bool:
        """Whether a tensor is produced and used inside one group alone."""
        root = self.costs.root(name)
        producer = self.costs.cls.producer.get(root)
        group = self.group_of.get(producer.name) if producer is not None else None
        return group is not None and self._readers.get(root, set()) <= {group} and root not in self._outputs

    def inputs(self, root: str) -> dict[str, None]:
        """The tensors (as stored) that a group reads from outside."""
        produced = {output for op in self.groups[root] for output in op.outputs}
        return dict.fromkeys(
            self.costs.root(name) for op in self.groups[root] for name in op.operands
            if self.costs.root(name) not in produced
        )

    def read_again(self, root: str) -> set[str]:
        """The group's inputs that its backward computes from: those that what its ops would keep is made of.

        A rotation of queries is linear in them, so that its backward needs the angles alone.
        """
        ops = self.groups[root]
        needed = {self.costs.root(name) for op in ops for name in op.saved}
        for op in reversed(ops):
            if any(output in needed and self.is_internal(output) for output in op.outputs if output):
                needed.update(self.costs.root(name) for name in op.operands)
        return needed.intersection(self.inputs(root))

    def kept_inputs(self) -> tuple[str, ...]:
        """Inputs of groups that the backward reads."""
        return tuple(
            name for root in self.groups for name in sorted(self.read_again(root))
            if self.costs.whole(name).requires_grad
        )

    def times(self, state: dict[str, Placement]) -> tuple[float, float]:
        """Seconds of all groups, forward and backward."""
        costs, device = self.costs, self.costs.device
        bandwidth = memory_bandwidth(device)
        forward = backward = 0.0
        for root, ops in self.groups.items():
            read = [costs.local(name, state[name]) for name in self.inputs(root)]
            written = [
                costs.local(output, state[output]) for op in ops for output in op.outputs
                if output and not self.is_internal(output)
            ]
            in_bytes = sum(tensor.size_bytes for tensor in read)
            out_bytes = sum(tensor.size_bytes for tensor in written)
            grads = sum(tensor.size_bytes for tensor in read if tensor.requires_grad)
            forward += kernel_time_s(device, (in_bytes + out_bytes) / bandwidth)
            if any(tensor.requires_grad for tensor in written):
                again = sum(costs.local(name, state[name]).size_bytes for name in self.read_again(root))
                backward += kernel_time_s(device, (again + out_bytes + grads) / bandwidth)
        return forward, backward
