"""Operations on colours: each takes an RGB image and a magnitude, and gives an RGB image of the same size."""

from PIL import Image, ImageFilter
from torchvision.transforms import functional as TF


def identity(image: Image.Image, magnitude: float) -> Image.Image:
    """The image as it is."""
    return image


def brightness(image: Image.Image, magnitude: float) -> Image.Image:
    """`magnitude` is the factor of the pixels; 0: black, 1: as it is."""
    return TF.adjust_brightness(image, magnitude)


def saturation(image: Image.Image, magnitude: float) -> Image.Image:
    """`magnitude` is the factor of the colourfulness; 0: grey, 1: as it is."""
    return TF.adjust_saturation(image, magnitude)


def contrast(image: Image.Image, magnitude: float) -> Image.Image:
    """`magnitude` is the factor of the distance to the mean grey; 1: as it is."""
    return TF.adjust_contrast(image, magnitude)


def sharpness(image: Image.Image, magnitude: float) -> Image.Image:
    """`magnitude` is the factor of the distance to a smoothed image; 0: smoothed, 1: as it is."""
    return TF.adjust_sharpness(image, magnitude)


def hue(image: Image.Image, magnitude: float) -> Image.Image:
    """`magnitude` is the shift, as a share of the circle of hues."""
    return TF.adjust_hue(image, magnitude)


def posterize(image: Image.Image, magnitude: float) -> Image.Image:
    """`magnitude` is the number of bits that are kept of every value."""
    return TF.posterize(image, int(magnitude))


def solarize(image: Image.Image, magnitude: float) -> Image.Image:
    """Values from `magnitude` on are inverted."""
    return TF.solarize(image, magnitude)


def autocontrast(image: Image.Image, magnitude: float) -> Image.Image:
    """Every channel is stretched from 0 to 255; there is no magnitude."""
    return TF.autocontrast(image)


def equalize(image: Image.Image, magnitude: float) -> Image.Image:
    """Every channel gets an even histogram; there is no magnitude."""
    return TF.equalize(image)


def invert(image: Image.Image, magnitude: float) -> Image.Image:
    """The negative; there is no magnitude."""
    return TF.invert(image)


def grayscale(image: Image.Image, magnitude: float) -> Image.Image:
    """Without colour, in three channels; there is no magnitude."""
    return TF.rgb_to_grayscale(image, num_output_channels=3)


def blur(image: Image.Image, magnitude: float) -> Image.Image:
    """`magnitude` is the radius for 224 pixels; another resolution of the same view is blurred alike."""
    return image.filter(ImageFilter.GaussianBlur(magnitude * image.width / 224))
