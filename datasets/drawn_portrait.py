"""What every feature of a drawn face needs: the traits, the pose, the canvas and the shaded paints."""

from stylepipe.datasets.drawn_canvas import Canvas, Mask, Paint, Points
from stylepipe.datasets.drawn_shading import Pose, hair_field, shadow_of, skin_field
from stylepipe.datasets.drawn_traits import Colour, Face

_FINEST_SKIN, _FINEST_HAIR = 256, 512  # shading is smooth: computed at these sizes at the most, then enlarged
DARK: Colour = (0.06, 0.04, 0.045)
WHITE: Colour = (1.0, 0.99, 0.97)


class Portrait:
    """Holds what every feature needs: the traits, the pose, the canvas and the shaded paints."""

    def __init__(self, face: Face, size: int) -> None:
        self.face = face
        self.pose = Pose(face)
        self.canvas = Canvas(size)
        self.skin = self.canvas.enlarged(skin_field(face, self.pose, min(size, _FINEST_SKIN)))
        self.hair = self.canvas.enlarged(hair_field(face, self.pose, min(size, _FINEST_HAIR)))
        self.head: Mask | None = None  # once drawn, what lies on the skin stays within it
        self.skin_shadow = shadow_of(face.skin)
        self.shadow_side = -1.0 if face.light[0] > 0.0 else 1.0

    def fill(
        self,
        outline: Points,
        paint: Paint,
        opacity: float = 1.0,
        blur: float = 0.0,
        *,
        within: Mask | None = None,
        lift: float = 0.0,
        hole: Points | None = None,
    ) -> Mask:
        """Paints a shape given in face coordinates, standing `lift` out of the head; see Canvas.fill."""
        place = self.pose.place
        inside = None if hole is None else place(hole, lift)
        return self.canvas.fill(place(outline, lift), paint, opacity, blur, within=within, hole=inside)
