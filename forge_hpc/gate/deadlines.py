"""How long the gate waits: with all nodes there it is over after ``GATE_S``, whatever they do."""

GATE_S = 18.0
"""From when all nodes are there. Who has said nothing by then is not fit."""
PRODUCT_S = 12.0
"""The part of it after which a node must have started a Python and multiplied two matrices."""
CALM_S = 2.0
"""Unless the others have taken longer than this, too."""
EXCHANGE_S = 6.0
"""An exchange with a neighbour that is there."""
OWN_S = 14.0
"""What a node looks at by itself: a disk that hangs is a disk that fails."""
