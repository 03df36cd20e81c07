"""Measures this machine: rates of operations and links, as a Profile that a Cluster can take."""

from autopar.profiler.file import load_profile, profile_from_json, profile_to_json, save_profile
from autopar.profiler.local import profile_local
from autopar.profiler.profile import LinkFit, MatmulRate, Profile, apply_profile, merge_profiles

__all__ = [
    "LinkFit", "MatmulRate", "Profile", "apply_profile", "load_profile", "merge_profiles", "profile_from_json",
    "profile_local", "profile_to_json", "save_profile",
]
