"""What command lines have in common: the options that name a network, and numbers that must be positive."""

import argparse
from typing import Any

from orchestrator.config import ModelConfig
from orchestrator.errors import ConfigError
from orchestrator.yaml_files import load_yaml, validate

MODEL_HELP = "a torchvision classifier, resnet<6n+2>_cifar, or package.module:function"


def positive(text: str) -> int:
    """Return the whole number of an argument. Raises: argparse.ArgumentTypeError unless it is one of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number of at least 1")
    return number


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what belongs to a network beside its name."""
    parser.add_argument(
        "--image-size", type=positive, metavar="PIXELS", help="height and width of an image (224; CIFAR ResNets 32)"
    )
    parser.add_argument(
        "--num-classes", type=positive, metavar="N", help="outputs of the classifier (1000; CIFAR ResNets 10)"
    )
    parser.add_argument(
        "--kwargs",
        type=_keyword,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="further argument of the network's function, such as width=8; may be given several times",
    )


def chosen_model(arguments: argparse.Namespace) -> tuple[ModelConfig, int]:
    """Return the network of --model and its options, and the image size; what is not given is as its data sets usually are.

    Raises: ConfigError for a value that does not fit.
    """
    from orchestrator.models import CIFAR_NAME  # late: torch takes seconds to import, and --help should not wait for it

    is_cifar = CIFAR_NAME.fullmatch(arguments.model) is not None
    fields = {
        "name": arguments.model,
        "num_classes": arguments.num_classes or (10 if is_cifar else 1000),
        "kwargs": dict(arguments.kwargs),
    }
    return validate(ModelConfig, fields, "command line"), arguments.image_size or (32 if is_cifar else 224)


def _keyword(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    try:
        if equals and key:
            return key, load_yaml(value, f"the value of {key} is no YAML")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    raise argparse.ArgumentTypeError(f"found {text!r}, expected KEY=VALUE, such as width=8")
