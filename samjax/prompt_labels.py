"""What a point prompt's label says: the numbers of Meta's `SamOnnxModel`, and one of our own."""

INVALID = -2  # ours: the slot does not exist, so that one batch holds prompts of any length
NOT_A_POINT = -1  # upstream's padding point, which the decoder attends to like any other
BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = 0, 1, 2, 3
