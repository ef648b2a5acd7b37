"""`layer_sparsity`: own sparsities by regular expressions of module names, as a config gives them."""

import json


def read(text: str) -> dict[str, float]:
    """Reads own sparsities from the JSON text of a flag.

    Raises:
        ValueError: if it is not that of an object.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"layer_sparsity is not JSON ({error}), got {text!r}.") from error
    if not isinstance(values, dict):
        raise ValueError(f'layer_sparsity must be an object such as {{".*mlp.*": 0.9}}, got {text!r}.')
    return values
