"""Which rows and columns of attention's projections belong to which head."""

from collections.abc import Mapping, Sequence

from torch import nn

from gradstore.groups import Parameter, Part

QUERY, KEY, VALUE = (
    ("q_proj", "query", "q_lin", "wq"),
    ("k_proj", "key", "k_lin", "wk"),
    ("v_proj", "value", "v_lin", "wv"),
)
OUTPUT = ("o_proj", "out_proj", "out_lin", "c_proj", "dense", "wo")
# Queries, keys and values of all heads one behind the other, as GPT-2 has them; other layouts are not guessed at.
FUSED = ("c_attn",)
HEAD_SIZES = ("head_dim", "attention_head_size", "d_head")


def attention_parts(model: nn.Module, parameters: Mapping[str, Parameter]) -> dict[str, dict[str, Sequence[Part]]]:
    """The parts of each head of the parameters that attention heads share out: {parameter: {group name: parts}}.

    A module is attention if it states the size of a head and holds projections of the usual names. Head h has its rows of the
    query projection and its columns of the output projection; of keys and values too where each head has its own. Where
    several heads share one (grouped queries), keys and values are groups of their own. Attention whose queries and outputs
    differ in width, which have gates among them or parts of another size, is not shared out.
    """
    found: dict[str, dict[str, Sequence[Part]]] = {}
    for name, module in model.named_modules():
        size = next((value for key in HEAD_SIZES if isinstance(value := getattr(module, key, None), int)), None)
        if size is None:
            continue
        children = {child: f"{name}.{child}" for child, _ in module.named_children()}
        found |= _of_module(name, children, size, parameters)
    return found


def _of_module(
    name: str, children: Mapping[str, str], size: int, parameters: Mapping[str, Parameter]
) -> dict[str, dict[str, Sequence[Part]]]:
    def parameter(names: Sequence[str], tensor: str) -> Parameter | None:
        paths = (f"{children[child]}.{tensor}" for child in names if child in children)
        return next((parameters[path] for path in paths if path in parameters), None)

    found: dict[str, dict[str, Sequence[Part]]] = {}
    queries, output = parameter(QUERY, "weight"), parameter(OUTPUT, "weight")
    if queries is not None and output is not None and queries.out_features != output.in_features:
        return found
    heads = queries.out_features // size if queries is not None else 0
    for names in (QUERY, KEY, VALUE):
        for tensor in ("weight", "bias"):
            item = parameter(names, tensor)
            if item is not None and item.out_features % size == 0:
                shared = item.out_features // size < heads
                found[item.name] = _row_parts(f"{name}.{'kv_heads' if shared else 'heads'}", item, size)
    fused = parameter(FUSED, "weight")
    if fused is not None and fused.out_features % (3 * size) == 0:
        heads = fused.out_features // (3 * size)
        for item in (fused, parameter(FUSED, "bias")):
            if item is not None:
                found[item.name] = _fused_parts(f"{name}.heads", item, size, heads)
    if output is not None and heads and output.in_features == heads * size:
        found[output.name] = {
            f"{name}.heads.{head}": [
                Part(
                    parameter=output.name,
                    rows=(0, output.out_features),
                    columns=(head * size, (head + 1) * size),
                )
            ]
            for head in range(heads)
        }
    return found


def _row_parts(prefix: str, item: Parameter, size: int) -> dict[str, Sequence[Part]]:
    return {
        f"{prefix}.{head}": [
            Part(parameter=item.name, rows=(head * size, (head + 1) * size), columns=(0, item.in_features))
        ]
        for head in range(item.out_features // size)
    }


def _fused_parts(prefix: str, item: Parameter, size: int, heads: int) -> dict[str, Sequence[Part]]:
    """Of queries, keys and values one behind the other, each head's rows of all three."""
    return {
        f"{prefix}.{head}": [
            Part(
                parameter=item.name,
                rows=((side * heads + head) * size, (side * heads + head + 1) * size),
                columns=(0, item.in_features),
            )
            for side in range(3)
        ]
        for head in range(heads)
    }
