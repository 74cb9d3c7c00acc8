# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""evidence.py's picture: score against deviation from the initial model, a curve a method."""

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# All lengths are px of a picture that is saved at half the size: Pillow's lines are jagged.
SIZE = (2160, 1260)
LEFT = 150
RIGHT = 1640
TOP = 140
BOTTOM = 1130
LIGHT = "#e4e4e4"
DARK = "#444444"


@dataclass
class Point:
    deviation: float
    score: float
    spread: float  # half the length of the error bar
    is_chosen: bool


@dataclass
class Curve:
    title: str
    colour: str
    points: list  # by growing learning rate
    letter: str = ""  # at the point and before the title, where there is no colour to tell by


class Axes:
    """Deviation (logarithmic) and score -> px. Scores below the frame lie on its lower edge."""

    def __init__(self, curves, initial):
        points = [point for curve in curves for point in curve.points]
        deviations = [point.deviation for point in points]
        self.left = math.log(min(deviations) / 1.3)
        self.right = math.log(max(deviations) * 1.3)
        self.low = initial - 0.015
        self.high = max(initial, *(point.score + point.spread for point in points)) + 0.003

    def x(self, deviation):
        part = (math.log(deviation) - self.left) / (self.right - self.left)
        return LEFT + (RIGHT - LEFT) * part

    def y(self, score):
        part = (self.high - score) / (self.high - self.low)
        return min(TOP + (BOTTOM - TOP) * part, BOTTOM)


def draw_picture(curves, initial, file):
    """Draw curves; initial: the initial model's score.

    One method is better than another at the same distance from the initial model where its curve
    lies above the other's.
    """
    axes = Axes(curves, initial)
    single = [curve for curve in curves if len(curve.points) == 1]
    for letter, curve in zip("abcdefghijkl", single):
        curve.letter = f"{letter}  "
    sheet = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(sheet)
    draw_grid(draw, axes)
    y = axes.y(initial)
    draw.line((LEFT, y, RIGHT, y), DARK, 3)
    write(draw, LEFT + 10, y + 6, "initial model", "la", DARK)
    write(draw, LEFT, 16, "Mean ground-truth score: higher is better", "la", size=34)
    note = "Large: the chosen setting. Small: other learning rates. "
    note += "Bars: standard deviation over seeds. Triangles: below this picture. Letters: no curve."
    write(draw, LEFT, 74, note, "la", DARK)
    note = "Deviation: mean squared difference from the initial model's predictions"
    write(draw, (LEFT + RIGHT) / 2, BOTTOM + 64, note, "ma", size=30)
    draw_titles(draw, axes, curves)
    for curve in curves:
        draw_curve(draw, axes, curve)
    sheet.reduce(2).save(file, optimize=True)


def draw_grid(draw, axes):
    for exponent, digit in product(range(-9, 2), (1, 2, 5)):
        deviation = digit * 10.0**exponent
        if axes.left < math.log(deviation) < axes.right:
            x = axes.x(deviation)
            draw.line((x, TOP, x, BOTTOM), LIGHT, 2)
            write(draw, x, BOTTOM + 16, f"{deviation:g}", "ma", DARK)
    for score in np.arange(math.ceil(100 * axes.low), 100 * axes.high) / 100:
        y = axes.y(score)
        draw.line((LEFT, y, RIGHT, y), LIGHT, 2)
        write(draw, LEFT - 14, y, f"{score:.2f}", "rm", DARK)


def draw_curve(draw, axes, curve):
    line = [(axes.x(point.deviation), axes.y(point.score)) for point in curve.points]
    draw.line(line, curve.colour, 5, joint="curve")
    for point, (x, y) in zip(curve.points, line):
        bar = (x, axes.y(point.score - point.spread), x, axes.y(point.score + point.spread))
        draw.line(bar, curve.colour, 3)
        if point.score < axes.low:
            draw.regular_polygon((x, y - 8, 16), 3, 180, curve.colour)
        else:
            draw.circle((x, y), 15 if point.is_chosen else 9, curve.colour)
        write(draw, x - 20, y - 4, curve.letter.strip(), "rb", curve.colour, 30)


def draw_titles(draw, axes, curves, gap=46):
    """The titles right of the frame, each with a thin line from its curve's last point."""
    ordered = sorted(curves, key=lambda curve: axes.y(curve.points[-1].score))
    # From the lowest upwards: at its point's height, or as far up as the title below it demands.
    limit = BOTTOM
    for above, curve in reversed(list(enumerate(ordered))):
        end = curve.points[-1]
        x = axes.x(end.deviation)
        y = axes.y(end.score)
        height = max(min(y, limit), TOP + gap * above)
        draw.line((x, y, RIGHT + 10, height, RIGHT + 40, height), "#bbbbbb", 2)
        write(draw, RIGHT + 48, height, curve.letter + curve.title, "lm", curve.colour, 30)
        limit = height - gap


def write(draw, x, y, text, anchor, colour="black", size=26):
    draw.text((x, y), text, colour, ImageFont.load_default(size), anchor)
