"""Other libraries for private training, each as its own guide has it used.

Poisson sampling and virtual batching are the harness's for all of them, so that logical and physical batches
are the same as ours. What is said here needs none of the libraries; an adapter is imported when it is used.
"""

from dptrain.bench.peers.peer import Peer

__all__ = ["PEERS", "Peer"]

_PEERS = (
    Peer(
        name="opacus",
        methods={
            "per-example": "hooks",
            "O-flat": "hooks",
            "opacus": "hooks",
            "per-example-vmap": "functorch",
            "functorch_dp": "functorch",
            "functorch": "functorch",
            "ghost": "ghost",
            "O-ghost": "ghost",
        },
        packages=("opacus",),
        framework="torch",
        install="install it with: pip install opacus.",
        adapter="opacus",
    ),
    Peer(
        name="fastdp",
        methods={
            "bk-ghost": "ghost",
            "BK-ghost": "ghost",
            "bk-mixed-ghost": "MixGhostClip",
            "BK-MixGhostClip": "MixGhostClip",
            "bk-mix-opt": "MixOpt",
            "BK-MixOpt": "MixOpt",
        },
        packages=("fastDP", "transformers"),
        framework="torch",
        install="clone https://github.com/awslabs/fast-differential-privacy, let the environment variable "
        "FASTDP name the clone, and install what it imports with: pip install transformers scipy.",
        adapter="fastdp",
    ),
    Peer(
        name="private-vision",
        methods={
            "ghost": "ghost",
            "PV-ghost": "ghost",
            "mixed-ghost": "ghost_mixed",
            "PV-ghost_mixed": "ghost_mixed",
        },
        packages=("private_vision",),
        framework="torch",
        install="clone https://github.com/woodyx218/private_vision, let the environment variable "
        "PRIVATE_VISION name the clone, and install what it imports with: pip install scipy.",
        adapter="private_vision",
    ),
    Peer(
        name="jax-privacy",
        methods={"per-example-vmap": "vmap", "private-mini": "vmap", "DP": "vmap"},
        packages=("jax_privacy", "jax"),
        framework="jax",
        install="install it with: pip install jax-privacy.",
        adapter="jax_privacy",
    ),
)

PEERS: dict[str, Peer] = {peer.name: peer for peer in _PEERS}
