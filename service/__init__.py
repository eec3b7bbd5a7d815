"""The warmscale service: REST API, studies, leases, results."""

from importlib.metadata import version

__version__ = version("warmscale")
