"""A word-level tokenizer and the stock LLaVA processor for the tiny world."""

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from .front_ends import FRONT_ENDS
from .world import CELLS, COLORS, FORMS, ROWS, SIZES

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
USER, ASSISTANT = "USER:", "ASSISTANT:"

QUESTION_WORDS = """
    a add all and are ask can cell cells color colour column describe digit digits do does each find first form forms
    give has have hello how in is it larger left list many me more most name next no none not number object objects of
    on one or picture please right row scene second see show shown smaller sum tell than that the there this to total
    two what where which with yes you
"""

# LLaVA-1.5's layout with "</s>" after each answer. The generation marks are for `return_assistant_tokens_mask`.
CHAT_TEMPLATE = """
{{- bos_token -}}
{%- for message in messages -%}
    {%- set content = message['content'] -%}
    {%- if content is string -%}{%- set content = [{'type': 'text', 'text': content}] -%}{%- endif -%}
    {%- set text = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') -%}
    {%- if message['role'] == 'assistant' -%}
        {{- 'ASSISTANT:' -}}{%- generation -%}{{- ' ' + text + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- 'USER: ' if message['role'] == 'user' else '' -}}
        {%- for part in content if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
        {{- text + ' ' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def vocabulary() -> list[str]:
    """Every word the world uses, the special tokens first; the order is the token id."""
    plurals = [f"{form}s" for form in FORMS if form != "cross"] + ["crosses"]
    words = {*QUESTION_WORDS.split(), *COLORS, *FORMS, *plurals, *SIZES, *CELLS, *ROWS}
    numbers = [str(number) for number in range(19)]
    return [PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT, *",.?!", *numbers, *sorted(words - set(numbers))]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words and punctuation marks, lower case; pads on the left, as generating in batches needs."""
    words = vocabulary()
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNK))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    # The role tags are single tokens and are found before the text is put in lower case.
    backend.add_special_tokens([PAD, BOS, EOS, UNK, IMAGE])
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in (USER, ASSISTANT)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=512,
        extra_special_tokens={"image_token": IMAGE},
    )


def build_processor(front_end: str = "stock") -> LlavaProcessor:
    """The stock processor: pictures become what the tower is given (56x56 for stock), no crop, 16 image tokens each."""
    front = FRONT_ENDS[front_end]()
    side = {"height": front.side, "width": front.side}
    image_processor = CLIPImageProcessor(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=front.patch_size,
        vision_feature_select_strategy=front.feature_strategy,
        num_additional_image_tokens=int(front.has_class_token),
        chat_template=CHAT_TEMPLATE,
    )
