"""Names as users type them: exact, by alias, by an unambiguous beginning, or an error that says the nearest ones."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from autopar.errors import InputError


def resolve_name(name: str, known: Mapping[str, tuple[str, ...]], *, what: str) -> str:
    """The key of `known` that `name` stands for: the key itself, an alias, or the only key that begins with it.

    Case and underscores do not matter. Raises InputError with the keys that it could be, or the nearest ones.
    """
    plain = {_fold(key): key for key in known}
    wanted = _fold(name)
    if wanted in plain:
        return plain[wanted]
    aliased = [key for key, aliases in known.items() if wanted in map(_fold, aliases)]
    if len(aliased) == 1:
        return aliased[0]
    longer = [key for folded, key in plain.items() if folded.startswith(f"{wanted}-")]
    if len(longer) == 1:
        return longer[0]
    if longer:
        raise InputError(f"{what} {name!r} may be {' or '.join(longer)}: write which")
    folds = [folded for folded in plain if wanted and folded.startswith(wanted)]
    folds += [folded for folded in get_close_matches(wanted, list(plain), n=3, cutoff=0.5) if folded not in folds]
    near = [plain[folded] for folded in folds[:3]]
    if near:
        raise InputError(f"unknown {what} {name!r}: did you mean {' or '.join(near)}? Known: {', '.join(known)}")
    raise InputError(f"unknown {what} {name!r}. Known: {', '.join(known)}")


def _fold(name: str) -> str:
    return name.strip().casefold().replace("_", "-")
