import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.distributions import Uniform
from torchvision.transforms import RandomResizedCrop

from cloob.data.transforms import TrainTransform, crop_box, resize
from cloob.pictures import Encoded, Unreadable, decode
from make import encoded, noise_image


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("height", "width"), [(300, 200), (40, 400)])
def test_crops_are_distributed_as_torchvisions(height, width):
    """Means of the box over many draws agree within five standard errors."""
    n, scale, ratio = 4000, (0.2, 0.8), (3 / 4, 4 / 3)
    blank = torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(n)], float)
    draws = Uniform(0.0, 1.0).sample((n, 22)).double().tolist()
    ours = np.array([crop_box(height, width, scale, ratio, u) for u in draws], float)
    error = np.sqrt((theirs.var(0) + ours.var(0)) / n)
    assert (np.abs(theirs.mean(0) - ours.mean(0)) <= 5 * error + 1e-9).all()


@pytest.mark.parametrize(("width", "height", "size"), [(64, 64, 64), (500, 375, 224), (20, 30, 64)])
def test_resize_is_pillows_bicubic_within_one_level(width, height, size):
    image = noise_image(0, width, height)
    expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    ours = resize(torch.from_numpy(np.array(image)).permute(2, 0, 1), size)
    assert ours.dtype == torch.uint8 and ours.shape == (3, size, size)
    assert np.abs(ours.numpy().astype(int) - expected).max() <= 1


def test_flip_is_off_by_default_and_mirrors_half_of_the_time():
    image = noise_image(0, 16, 16)
    plain, flipping = TrainTransform(16, scale=(1.0, 1.0)), TrainTransform(16, scale=(1.0, 1.0), flip=True)
    flips = 0
    for seed in range(200):
        a, b = (t(image, seeded(seed)) for t in (plain, flipping))
        assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
        flips += not torch.equal(a, b)
    assert 70 <= flips <= 130


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 300), st.floats(0.01, 1), st.integers(0, 9))
def test_a_reduced_crop_has_enough_pixels_and_lies_on_whole_ones(width, height, size, low, seed):
    crop = TrainTransform(size, scale=(low, 1.0)).draw(width, height, seeded(seed))
    exact = TrainTransform(size, scale=(low, 1.0), reduce=False).draw(width, height, seeded(seed))
    r = crop.reduction
    assert r in (1, 2, 4, 8) and exact.reduction == 1 and crop.source_size == (width, height)
    assert all(value % r == 0 for value in crop[:4])
    if r > 1:
        assert min(crop.height, crop.width) // r >= size
    if r < 8:  # and the next factor would be too much
        assert min(exact.height, exact.width) // (2 * r) < size
    # Each edge moves by less than one pixel of the result.
    for start, length in ((0, 2), (1, 3)):
        pixel = exact[length] / size
        assert 0 <= exact[start] - crop[start] < max(1, pixel)
        assert 0 <= exact[length] - crop[length] < max(1, pixel)
    for box in (crop, exact):
        assert min(box.height, box.width) >= 1 and min(box.top, box.left) >= 0
        assert box.top + box.height <= height and box.left + box.width <= width


def photograph(width, height, seed=0):
    """A JPEG whose detail falls off as in photographs: octaves of noise."""
    random = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for octave in range(1, 9):
        noise = random.normal(0, 30 * 0.75**octave, (2**octave, 2**octave, 3)).astype(np.float32)
        for c in range(3):
            layer = Image.fromarray(noise[..., c]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., c] += np.asarray(layer)
    return encoded(Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)), "JPEG", quality=88)


@pytest.mark.parametrize(
    ("width", "height", "size", "reduction"),
    [(150, 145, 64, 2), (301, 255, 64, 2), (420, 380, 64, 4), (700, 640, 64, 8)],
)
def test_the_reduced_crop_looks_like_the_whole_ones(width, height, size, reduction):
    data, transform = photograph(width, height), TrainTransform(size)
    for seed in range(5):
        crop = transform.draw(width, height, seeded(seed))
        assert crop.reduction == reduction
        whole = transform.take(decode(data), crop)
        assert torch.equal(whole, transform(decode(data), seeded(seed)))  # the crop is the same for other formats
        reduced = transform.take(Encoded(data).rgb(crop.reduction), crop)
        assert reduced.shape == whole.shape == (3, size, size) and reduced.dtype == torch.uint8
        difference = (reduced.int() - whole.int()).abs().float()
        assert difference.mean() < 3 and difference.max() < 30
        shifted = transform.take(decode(data), crop._replace(left=max(0, crop.left - 2 * reduction)))
        if crop.left >= 2 * reduction:  # the bound can tell a crop that is two pixels of the reduced image off
            assert (shifted.int() - whole.int()).abs().float().mean() > difference.mean()


def test_an_image_in_several_pieces_passes():
    """Pillow keeps more than 16 MB in blocks, which cannot be handed out as one."""
    image = Image.new("RGB", (2400, 2000), (9, 8, 7))
    assert TrainTransform(8)(image, seeded(0)).unique().tolist() == [7, 8, 9]


def test_a_jpeg_of_several_pictures_is_its_first():
    first, second = Image.new("RGB", (64, 48), (250, 0, 0)), Image.new("RGB", (64, 48), (0, 0, 250))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    for reduction, size in ((1, (64, 48)), (4, (16, 12))):
        image = Encoded(data).rgb(reduction)
        assert image.size == size and image.getpixel((2, 2))[0] > 200


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {}), ("RGB", {"subsampling": 0}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True})],
)
def test_a_jpeg_that_lacks_its_end_is_taken(mode, options):
    """What is there is as it was; what is missing is grey, a tenth of the rows at most."""
    data = encoded(noise_image(0, 640, 480).convert(mode), "JPEG", quality=90, **options)
    whole = np.asarray(decode(data))
    for end in (1, 2, 30, len(data) // 20):
        file, smaller = Encoded(data[:-end]), Encoded(data[:-end])
        found = np.asarray(file.rgb())
        assert file.truncated or end <= 2
        assert "progressive" in options or np.array_equal(found[:432], whole[:432])
        assert end > 2 or np.array_equal(found, whole)
        assert smaller.rgb(4).size == (160, 120) and (smaller.truncated or end <= 2)
    if "progressive" not in options:
        with pytest.raises(Unreadable, match=r"2\d% of its rows missing"):
            decode(data[: len(data) * 3 // 4])
    file = Encoded(data)
    file.rgb()
    assert not file.truncated
