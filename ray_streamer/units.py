"""How are sizes and counts shown to people? Bytes with a binary unit, as the settings accept them; rates in GB/s; one file, two files."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def human_bytes(num_bytes: float) -> str:
    """A byte count with three or more significant digits, less what is zero.

    >>> [human_bytes(count) for count in (0, 1000, 64 << 20, 1234567890)]
    ['0 B', '1000 B', '64 MiB', '1.15 GiB']
    """
    power = 0
    while abs(num_bytes) >= 1024 and power < len(_UNITS) - 1:
        num_bytes, power = num_bytes / 1024, power + 1
    digits = 2 if num_bytes < 10 else 1 if num_bytes < 100 else 0
    text = f"{num_bytes:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if digits else text} {_UNITS[power]}"


def human_rate(bytes_per_second: float) -> str:
    """Bytes per second with three or so significant digits.

    >>> [human_rate(rate) for rate in (1.234e9, 220e6, 4.2e6, 1500.0)]
    ['1.23 GB/s', '0.22 GB/s', '4.2 MB/s', '1.5 kB/s']
    """
    if bytes_per_second >= 1e8:
        return f"{bytes_per_second / 1e9:.2f} GB/s"
    if bytes_per_second >= 1e5:
        return f"{bytes_per_second / 1e6:.3g} MB/s"
    return f"{bytes_per_second / 1e3:.3g} kB/s"


def exact_bytes(num_bytes: int) -> str:
    """A byte count without loss: in the largest unit that divides it, else with the bytes beside it.

    >>> [exact_bytes(count) for count in (8 << 20, 65536, 262143, 1536, 7, 1)]
    ['8 MiB', '64 KiB', '256 KiB (262143 bytes)', '1.5 KiB', '7 bytes', '1 byte']
    """
    if num_bytes < 1024:
        return counted(num_bytes, "byte")
    text = human_bytes(num_bytes)
    number, unit = text.split()
    return text if float(number) * 1024 ** _UNITS.index(unit) == num_bytes else f"{text} ({num_bytes} bytes)"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things, in the plural unless it is one of them; with an "s" unless the plural is given.

    >>> counted(1, "file"), counted(2, "file"), counted(0, "index", "indices")
    ('1 file', '2 files', '0 indices')
    """
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def verb(number: int, one: str, more: str) -> str:
    """The form of a verb that goes with so many things.

    >>> [f"{counted(number, 'file')} {verb(number, 'is', 'are')} missing" for number in (1, 2)]
    ['1 file is missing', '2 files are missing']
    """
    return one if number == 1 else more
