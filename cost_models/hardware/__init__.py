"""The hardware tables (devices.yaml, links.yaml) and what reads them.

The reading itself lives in `autopar.cluster.tables`, one floor below, because a Cluster is made of these constants.
"""

from autopar.cluster.tables import device_names, device_type, dtype_note, link_names, link_preset

__all__ = ["device_names", "device_type", "dtype_note", "link_names", "link_preset"]
