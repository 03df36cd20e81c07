"""The profile file: versioned JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from autopar.errors import InputError
from autopar.files import write_text
from autopar.profiler.profile import Profile

FORMAT = "autopar-profile"
VERSION = 2  # 1 had no ops and no fits by group


def profile_to_json(profile: Profile) -> str:
    """The Profile as JSON that `profile_from_json` reads back to an equal value."""
    return json.dumps({"format": FORMAT, "version": VERSION} | asdict(profile), indent=1, allow_nan=False) + "\n"


def profile_from_json(text: str, *, where: str = "profile JSON") -> Profile:
    """The Profile of `profile_to_json`'s text; InputError where it is cut off, foreign or of another version."""
    try:
        data: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}, line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise InputError(f'{where}: not a profile of autopar: it lacks "format": "{FORMAT}"')
    version = data.pop("version", None)
    if version != VERSION:
        raise InputError(f"{where}: version {version!r} is not supported, this autopar reads {VERSION}")
    try:
        profile = TypeAdapter(Profile).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    rates = [profile.memory_bandwidth_bytes_per_s, profile.launch_s, *profile.peak_flops().values()]
    rates += [fit.bytes_per_s for fit in (profile.send_recv, profile.all_reduce) if fit is not None]
    rates += [piece.bytes_per_s for fit in profile.fits for piece in fit.pieces]
    times = [time for sample in profile.ops.samples for time in (sample.forward_s, sample.backward_s)]
    times += [piece.latency_s for fit in profile.fits for piece in fit.pieces]
    if not all(0 <= time < float("inf") for time in times) or not all(fit.pieces for fit in profile.fits):
        raise InputError(f"{where}: a measured time is negative or missing: profile the machine again")
    if profile.num_processes < 1 or not all(0 < rate < float("inf") for rate in rates):
        raise InputError(f"{where}: a rate or the number of processes is not positive: profile the machine again")
    return profile


def save_profile(profile: Profile, path: Path) -> None:
    """Writes the profile file, whole or not at all."""
    write_text(path, profile_to_json(profile))


def load_profile(path: Path) -> Profile:
    """The Profile of a file; InputError that names it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read the profile {path}: {reason}") from None
    return profile_from_json(text, where=str(path))
