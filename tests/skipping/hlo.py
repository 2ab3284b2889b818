"""What an optimised program slices out of stacked weights, inside and outside the branches of its conditionals."""

import re


def sliced_weights(hlo: str, shape: str) -> tuple[int, int]:
    """How many slices of the shape (a pattern, such as "32,48|48,32") there are (inside, outside) of branches."""
    parts = re.split(r"\n(?=(?:ENTRY )?%?[\w.-]+ \(.*\{\n)", hlo)
    bodies = {re.match(r"(?:ENTRY )?%?([\w.-]+)", part).group(1): part for part in parts[1:]}
    conditionals = [line for body in bodies.values() for line in body.splitlines() if " conditional(" in line]
    assert conditionals, "no conditional in the program"
    todo = [name for line in conditionals for name in re.findall(r"%([\w.-]+)", line.split("conditional(")[1])]
    branches = set()
    while todo:
        if (name := todo.pop()) in bodies and name not in branches:
            branches.add(name)
            todo += re.findall(r"%([\w.-]+)", bodies[name])
    pattern = rf"= (?:f32|bf16)\[1?,?(?:{shape})\]\S* (?:dynamic-slice|gather)\("
    counts = {name: len(re.findall(pattern, body)) for name, body in bodies.items()}
    inside = sum(count for name, count in counts.items() if name in branches)
    return inside, sum(counts.values()) - inside
