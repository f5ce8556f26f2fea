"""An agent with a calculator, written against the openai package alone: nothing in it knows who trains its model."""

import ast
import json
import operator

import openai

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "The value of an expression of numbers, + and -.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string"}},
                "required": ["expression"],
            },
        },
    }
]
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub}


async def episode(base_url, api_key, example):
    """1 for the right answer, else 0."""
    messages = [{"role": "user", "content": example["question"]}]
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        for _ in range(4):
            answer = await client.chat.completions.create(model="policy", messages=messages, tools=TOOLS)
            message = answer.choices[0].message
            if not message.tool_calls:
                return float((message.content or "").strip() == example["answer"])
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls:
                result = calculate(call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return 0.0


def calculate(arguments):
    """The value of the expression, or what is wrong with it."""
    try:
        return str(value(ast.parse(json.loads(arguments)["expression"], mode="eval").body))
    except (KeyError, SyntaxError, TypeError, ValueError) as error:
        return f"error: {type(error).__name__}"


def value(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    raise ValueError("no sum")
