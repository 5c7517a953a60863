"""What the agent of a minigrid world sees, in words."""

from __future__ import annotations

from typing import Any


def in_view(world: Any) -> list[str]:
    """Objects in view, the nearest first, then the first wall on each side."""
    grid, visible = world.gen_obs_grid()
    size = world.agent_view_size
    near = []
    for x in range(size):
        for y in range(size):
            ahead, aside = size - 1 - y, x - size // 2
            thing = grid.get(x, y) if visible[x, y] and (ahead or aside) else None
            if thing and (thing.type != "wall" or not (ahead and aside)):
                near.append((thing.type == "wall", ahead + abs(aside), ahead, aside, name_of(thing)))
    seen, walls = [], set()
    for is_wall, _, ahead, aside, name in sorted(near):
        side = (ahead > 0, aside > 0)
        if is_wall and side in walls:
            continue
        walls |= {side} if is_wall else set()
        way = [f"{ahead} forward"] if ahead else []
        way += [f"{abs(aside)} {'left' if aside < 0 else 'right'}"] if aside else []
        seen.append(f"{name} {' '.join(way)}")
    return seen


def name_of(thing: Any) -> str:
    """A thing of the grid, with what can be seen of its state."""
    if thing.type in ("wall", "goal", "lava"):
        return str(thing.type)
    state = ""
    if thing.type == "door":
        state = "open " if thing.is_open else "locked " if thing.is_locked else "closed "
    return f"{state}{thing.color} {thing.type}"
