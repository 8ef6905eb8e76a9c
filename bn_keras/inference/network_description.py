"""The description stored with an exported network: its classes and its preprocessing."""

import json
from typing import NamedTuple

import bn_keras
from bn_keras.data.transforms import EVALUATION_FRACTION, Preprocessing

# Name of the description in the archive or the folder of an export.
FILE_NAME = "bn_keras.json"


class NetworkDescription(NamedTuple):
    """Class names, preprocessing and origin of an exported network.

    Attributes:
      class_names: name of each output, in order.
      input_shape: (height, width, channels).
      preprocessing: turns an image into the network's input.
      step: step of the run that the weights are from.
      statistics: "moving", "population" or "none"; see `TrainedNetwork`.
    """

    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    preprocessing: Preprocessing
    step: int
    statistics: str

    @property
    def input_range(self) -> tuple[float, float]:
        """Values of a black and of a white pixel in the network's input."""
        return (0.0, 1.0) if self.preprocessing.binary else (-1.0, 1.0)

    def describe_preprocessing(self) -> str:
        """Returns the preprocessing of an image as a sentence."""
        height, width, channels = self.input_shape
        numerator, denominator = EVALUATION_FRACTION
        largest = (
            "the largest centred square"
            if height == width
            else f"the largest centred window with the aspect ratio {width}:{height}"
        )
        window = {
            "inception": f"{numerator}/{denominator} of the sides of {largest}",
            "shift": largest,
            "none": "the whole image",
        }[self.preprocessing.crop]
        colours = "RGB" if channels == 3 else "grey levels"
        scale = "0 below 127.5 and 1 above" if self.preprocessing.binary else "[-1, 1]"
        return (
            f"Decode to {colours}, upright; take {window}; resize bilinearly to {height} x {width};"
            f" map the values 0 to 255 to {scale}."
        )

    def to_json(self) -> str:
        """Returns the description as ASCII text; docs/export.md documents the keys."""
        return json.dumps(
            {
                "class_names": self.class_names,
                "input_shape": self.input_shape,
                "crop": self.preprocessing.crop,
                "binary": self.preprocessing.binary,
                "preprocessing": self.describe_preprocessing(),
                "step": self.step,
                "statistics": self.statistics,
                "bn_keras": bn_keras.__version__,
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> "NetworkDescription":
        """Returns the description in a text; raises ValueError or KeyError if it has none."""
        values = json.loads(text)
        height, width, channels = values["input_shape"]
        return cls(
            tuple(values["class_names"]),
            (height, width, channels),
            Preprocessing((height, width), crop=values["crop"], binary=values["binary"]),
            values["step"],
            values["statistics"],
        )
