"""`offline-kd taps`: which feature maps of a network can be tapped."""

from __future__ import annotations

import click


@click.command("taps")
@click.argument("model")
@click.option("--size", default=32, show_default=True, type=click.IntRange(1, 2048), help="Height and width of images.")
def command(model: str, size: int) -> None:
    """The modules of MODEL whose feature maps can be tapped, in the order in which they finish.

    \b
    offline-kd taps cifar:resnet56_a
    """
    import torch

    from offline_kd.models.networks import build
    from offline_kd.models.taps import feature_maps
    from offline_kd.support.console import show_table
    from offline_kd.support.errors import ModelError

    network = build(model, 10)
    try:
        maps = feature_maps(network, torch.zeros(1, 3, size, size))
    except RuntimeError as error:  # of the network's own code, whatever it may be
        raise ModelError(f"{model}: does not run on images of {size}x{size}: {str(error).splitlines()[0]}") from error
    rows = [[name, f"{channels} x {height} x {width}"] for name, (_, channels, height, width) in maps.items()]
    show_table(f"{model}, images of {size}x{size}", ["module", "channels x height x width"], rows)
