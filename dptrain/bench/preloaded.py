"""What the processes of cases find imported. Nothing here starts a thread or touches a device."""

import timm  # noqa: F401
import torch  # noqa: F401

import dptrain.models
import dptrain.torch
import dptrain.training  # noqa: F401
