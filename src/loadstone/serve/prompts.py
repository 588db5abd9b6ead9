"""The prompt that Qwen3-Reranker was trained with: ONE text, for our own tokens and for vLLM's template. Pure.

The model judges "yes" or "no" after an assistant turn whose thinking is empty; without exactly this text around the
pair its scores mean nothing.
"""

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

PREFIX = (
    "<|im_start|>system\n"
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

NO, YES = "no", "yes"
"""The tokens whose logits are compared after the prompt."""


def before_document(query: str, instruction: str) -> str:
    """What stands between ``PREFIX`` and the document; an empty instruction is the default one."""
    return f"<Instruct>: {instruction or DEFAULT_INSTRUCTION}\n<Query>: {query}\n<Document>: "


def _of_role(role: str) -> str:
    return f'messages | selectattr("role", "eq", "{role}") | map(attribute="content") | first'


# The end is an expression because Jinja drops a newline that ends a template.
VLLM_TEMPLATE = (
    f'{PREFIX}<Instruct>: {{{{ instruction | default("{DEFAULT_INSTRUCTION}", true) }}}}\n'
    f"<Query>: {{{{ {_of_role('query')} }}}}\n"
    f"<Document>: {{{{ {_of_role('document')} }}}}"
    f"{SUFFIX.rstrip()}{{{{ '\n\n' }}}}"
)
"""The same as a score template of vLLM, for those who ask its own /score and /rerank."""
