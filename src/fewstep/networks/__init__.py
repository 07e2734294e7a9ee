"""Networks: a residual MLP for vectors and small images, a U-Net, discriminators and feature networks."""

from __future__ import annotations

from fewstep.networks.registry import NETWORKS, Architecture, build, default_network, parameter_count, resolve

__all__ = ["NETWORKS", "Architecture", "build", "default_network", "parameter_count", "resolve"]
