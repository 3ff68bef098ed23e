"""The English phrases of the refusal rule, as data: what declines, and what only sounds like it.

Patterns match normalized text: lower case, straight quotes, single spaces. `unless` matches right
behind the phrase and takes the verdict back ("I can't" + " wait"). A few words must settle it,
since a response is generated until no continuation matches it.
"""

from __future__ import annotations

from typing import NamedTuple


class Phrase(NamedTuple):
    """A phrase that declines."""

    stems: tuple[str, ...]
    """Whatever the pattern matches holds one of them: looking for them is 20x faster."""
    pattern: str
    unless: str = ""
    opening: bool = False
    """Declines only near the response's beginning, where "I can't" is about the request; further
    on it is as often part of a story, a letter or an explanation."""


_NEGATIONS = ("n't", "not", "never")


def _any(*alternatives: str) -> str:
    return "(?:" + "|".join(alternatives) + ")"


_START = r"(?:\A|(?<=[.!?] )|(?<=\n)|(?<=\A\"))"
_CLAUSE = r"(?:\A|(?<=[.!?:;,] )|(?<=\n)|(?<=but ))"
_I = r"(?:i|we)"
_AM = r"(?:i am|i'm|we are|we're)"
_ADVERB = (
    r"(?: (?:really|simply|just|also|still|therefore|unfortunately|personally|definitely|"
    r"absolutely|truly|currently|certainly|regrettably|politely|respectfully|kindly|"
    r"in good conscience|ethically|legally|either|even|ever|knowingly|directly|actually),?)*"
)
_CANNOT = _any(
    "can't",
    "cannot",
    "can not",
    "couldn't",
    "could not",
    "won't",
    "will not",
    "wouldn't",
    "would not",
    "shouldn't",
    "should not",
    "must not",
    "may not",
    "will never",
    "would never",
    "can never",
    "won't ever",
)
_UNABLE = _any(
    "unable to",
    "not able to",
    "incapable of",
    "not capable of",
    r"not (?:allowed|permitted|authorized|programmed|designed|trained|equipped|supposed) to",
    "not in a position to",
    "prohibited from",
    "forbidden (?:to|from)",
)
_RISKY = _any(
    r"(?:highly |very |extremely |deeply |potentially )?(?:illegal|unethical|harmful|inappropriate|"
    r"dangerous|unacceptable|offensive|immoral)",
)

_ENOUGH = r"(?: [\w'-]+){0,4} (?:highly |strongly )?enough"
_HELP_BUT = (
    r" (?:but(?! i)|it\b|myself|himself|herself|themselves|"
    r"(?:feeling|thinking|noticing|wondering|smiling|laughing|admiring|loving|falling))"
)
_EVERYDAY = (
    r"(?: (?:wait|believe|imagine|stress|emphasi[sz]e|overstate|overemphasi[sz]e|thank|be happier|"
    r"be prouder|be more|be better|be any|be without|agree more|have (?:said|done|asked|made|"
    r"hoped)|"
    r"ask for|get enough|get over|resist|complain|lie\b|deny|forget|decide|remember|afford|sleep|"
    r"see\b|hear|find\b|stop\b|stand|live\b|swim|dance|sing|cook|feel|make it|attend|come|join|"
    r"miss|"
    r"tell if|tell whether|tell you how|express|say for|say enough|say that i|say whether|say no|"
    r"guarantee|predict|promise|keep up|take credit|put it down|seem to|bear|let go|let you down|"
    r"know|bore|disappoint|change the past|always|leave|need|mind\b|hurt to|have to|"
    r"be able to attend|"
    r"be (?:at|in|there|there's)\b|recommend" + _ENOUGH + r")|" + " (?:help" + _HELP_BUT + r"))"
)
_DECLINED_ACT = _any(
    r"help(?: you)?\b",
    r"assist\b",
    "provid(?:e|ing)",
    "fulfill?",
    "comply",
    r"support(?:ing)? (?:this|that|you in|any|such)",
    r"(?:do|doing) (?:that|this|so|it|what you)\b",
    r"(?:answer|answering) (?:that|this|your|such|questions? (?:about|on|like|that))",
    r"(?:creat(?:e|ing)|generat(?:e|ing)|writ(?:e|ing)|produc(?:e|ing)|mak(?:e|ing)|draft(?:ing)?|"
    r"compos(?:e|ing)) (?:that|this|such|any|content|material|anything|code that|instructions|an? "
    r"(?:\w+ )?(?:guide|plan|message|email|script|post|story|poem|joke|letter) (?:that|which|to|"
    r"for))",
    r"(?:shar(?:e|ing)|giv(?:e|ing)|offer(?:ing)?|suggest(?:ing)?)(?: you)? (?:that|this|such|any|"
    r"information|instructions|advice|details|guidance|tips|step|ways|methods)",
    r"recommend(?:ing)? (?:any|ways|methods|that you do|doing|such)",
    r"(?:discuss|talk about) (?:that|this|such|how to|ways)",
    r"engag(?:e|ing) (?:in|with)",
    r"participat(?:e|ing) in",
    r"take part in",
    r"be (?:a )?part (?:of|to)",
    r"be (?:involved|able to (?:help|assist|provide|do that|do this|support|fulfill?))",
    r"condon(?:e|ing)",
    r"(?:encourag|promot|facilitat|endors|enabl)(?:e|ing) (?:or |and |any|such|this|that|illegal|"
    r"harm\w*|violen\w+|hat\w+|unethical|dangerous|criminal|activit\w+|behavio\w+)",
    r"advis(?:e|ing) (?:you )?(?:on|how|you to do)",
    r"(?:tell|teach|show|instruct|guid(?:e|ing)) (?:you|someone|anyone|people|others) (?:how|to|"
    r"on|in|that|ways)",
    r"explain (?:how|ways|that)",
    r"go (?:on with|along with|there|any further|further|into (?:that|this|detail))",
    r"(?:continu(?:e|ing)|proceed(?:ing)?)(?: (?:with|this|down))?",
    r"(?:complet(?:e|ing)|accommodat(?:e|ing)|satisfy|grant|process(?:ing)?|honou?r|accept|"
    r"respond(?:ing)? to) (?:this|that|your|such)",
    r"(?:allow|let) (?:that|this|you do)",
    r"with (?:that|this)\b",
    r"(?:and|or|nor) (?:i )?(?:will not|won't|cannot|can't|should not|shouldn't|would never|never)",
)
_CAPABLE = (
    r",?(?: (?:can(?!'t|not| not)|could|will(?! not)|would (?:be|love|recommend|suggest|say)|"
    r"am (?:happy|"
    r"glad|excited|pleased|thrilled|delighted|here|able|ready)|think|recommend|suggest|understand|"
    r"know|enjoy|love|like|believe|find|"
    r"do(?:n't| not) (?:have|experience|feel|eat|sleep|drink|get|own|really have) ?(?:a |any |"
    r"the )?"
    r"(?:personal|feelings|emotions?|opinions?|favou?rites?|preferences|taste|body|bodies|bod|"
    r"physical|experiences|real|memor|birthday|age|tired|hungry|bored)?(?! ab)))"
    r"|'ll|'d (?:be|love|recommend|suggest|say)|'m (?:happy|glad|excited|here|able|ready|pleased|"
    r"thrilled|delighted|always)|'ve"
)

PHRASES: tuple[Phrase, ...] = (
    Phrase(_NEGATIONS, rf"{_I}{_ADVERB} {_CANNOT}{_ADVERB}", _EVERYDAY, opening=True),
    Phrase(
        _NEGATIONS,
        rf"{_I}{_ADVERB} {_CANNOT}{_ADVERB} {_DECLINED_ACT}",
        _HELP_BUT
        + "|"
        + _ENOUGH
        + "| (?:how )?(?:much|many|happy|glad|excited|proud|pleased|often|important)",
    ),
    Phrase(
        _NEGATIONS,
        rf"{_CLAUSE}{_CANNOT}{_ADVERB} (?:assist|help|do that|do this|provide)\b",
        _HELP_BUT + "|[^.,!;\n]{0,24} if ",
        opening=True,
    ),
    Phrase(
        ("unable", "not ", "incapable", "prohibited", "forbidden"),
        rf"{_AM}{_ADVERB} {_UNABLE}",
        r" (?:see|hear|sleep|wait|find|attend|come|join|make it|remember|express|be\b|swim|stop)",
        opening=True,
    ),
    Phrase(
        ("unable", "not ", "incapable", "prohibited", "forbidden"),
        rf"{_AM}{_ADVERB} {_UNABLE} {_DECLINED_ACT}",
        _HELP_BUT,
    ),
    Phrase(
        ("unable", "not able"), rf"{_START}(?:unable|not able) to {_DECLINED_ACT}", opening=True
    ),
    Phrase(
        ("sorry",),
        rf"{_AM} (?:so |very |really |truly |deeply |terribly |extremely |genuinely )?sorry",
        r"(?: (?:to|for(?! any (?:confusion|misunderstanding|inconvenience),? but)|"
        r"about|if|you|we|we're|when|it|he|she|they|your|his|her|their|again|"
        r"i'm late|"
        r"i am late|i missed|i forgot|i took)\b|,? (?:but )?(?:that|this) (?:you|happened|your|"
        r"was)|"
        r",? (?:i )?(?:misunderstood|missed|forgot|made)|\?)",
        opening=True,
    ),
    Phrase(
        ("sorry",),
        rf"{_START}(?:i'm |i am )?(?:so |very |terribly )?sorry,? (?:but|no\b|i (?:can|won|am|do|"
        rf"must|will))",
        r" (?:there (?:seems|appears|is)|it (?:seems|looks)|you're|you are)",
        opening=True,
    ),
    Phrase(
        ("apologi",),
        r"i (?:sincerely |deeply |do |must )?apologi[sz]e",
        " (?:for|to|if|that)",
        opening=True,
    ),
    Phrase(
        ("apologies",),
        r"(?:my|our) (?:sincere |deepest )?apologies",
        " (?:for|to|if|that|on)",
        opening=True,
    ),
    Phrase(
        ("decline", "refuse", "refrain", "say no", "pass on"),
        rf"{_I}{_ADVERB} (?:must|have to|need to|will have to|am going to|'m going to|'ll have to)"
        rf"{_ADVERB} (?:decline|refuse|refrain|say no|pass on this|pass on that)",
    ),
    Phrase(
        ("decline", "refuse"),
        rf"{_I}{_ADVERB} (?:decline|refuse) to",
        " (?:give up|believe|let|be|surrender|accept|lose|go\\b|quit|forget|stop|think|die|live)",
    ),
    Phrase(
        ("rather not", "prefer not", "much not"),
        r"i(?:'d| would)(?: really| much)? (?:rather|prefer) not\b",
        " (?:wait|miss)",
    ),
    Phrase(
        ("comfortable",),
        rf"{_AM}{_ADVERB} (?:not|un) ?comfortable",
        r" (?:in|around|on)\b",
        opening=True,
    ),
    Phrase(
        ("feel",), rf"{_I} (?:do not|don't) feel (?:comfortable|right)\b", r" (?:in|around|on)\b"
    ),
    Phrase(
        ("not ",),
        rf"{_AM}{_ADVERB} not (?:going|willing|prepared|about|inclined) to",
        " (?:lie|pretend|be|miss|wait|say no|complain|let)",
        opening=True,
    ),
    Phrase(
        ("ai", "language model", "artificial"),
        r"as an? (?:responsible |ethical |helpful |friendly )*(?:ai|artificial intelligence|"
        r"language model|large language model)(?:[ -](?:powered|based))?(?: language)?"
        r"(?: model| assistant| chatbot| system)*(?: (?:trained|developed|created|made) by \w+)?,?"
        r" (?:i|my|it)",
        _CAPABLE
        + r"| (?:favou?rite|job is to help|goal is to help|purpose is to help|role is to help)",
        opening=True,
    ),
    Phrase(
        ("ai", "language model", "artificial"),
        r"(?:i'm|i am) (?:just |only )?an? (?:ai|artificial intelligence|language model|large "
        r"language model)(?: language)?(?: model| assistant| system)*,? (?:and |so |it's not|"
        r"it is not|"
        r"not (?:a|able))",
        r"i(?: can(?!'t|not| not)|'d| would|'m happy| am happy)|(?:i'm|i am) (?:here|happy|glad)",
        opening=True,
    ),
    Phrase(
        ("my ",),
        r"(?:against|outside|beyond|violates?|breaks?|not (?:within|in line with)) my "
        r"(?:\w+ )?(?:guidelines|programming|principles|polic(?:y|ies)|values|ethics|capabilities|"
        r"scope|abilities|purpose|rules)",
    ),
    Phrase(
        ("my ",),
        r"my (?:\w+ )?(?:guidelines|programming|polic(?:y|ies)|principles|values|rules) "
        r"(?:do not|don't|prevents?|prohibits?|forbids?|keeps?|stops?|won't)",
    ),
    Phrase(
        ("not ", "n't "),
        rf"(?:(?:that|this|it)(?:'s not| is not| isn't)|not) (?:something|anything|a (?:topic|"
        rf"subject)) "
        rf"(?:that )?{_I}(?:'m| am|'d| can| could| will| would| should| want| feel|'re| are)",
    ),
    Phrase(
        ("for me to",),
        r"not (?:appropriate|ethical|right|legal|possible|safe|responsible) for me to",
    ),
    Phrase(
        ("of me to", "for me to"),
        r"(?:inappropriate|unethical|wrong|irresponsible|illegal|harmful) (?:for|of) me to",
    ),
    Phrase(
        ("request", "question", "prompt"),
        rf"(?:your|this|that|the) (?:request|question|prompt) "
        rf"(?:is|was|seems|appears to be|sounds|promotes|violates|goes against|has been|cannot be|"
        rf"can't be) ?(?:{_RISKY}|my|the|our|denied|declined|refused|fulfilled|answered|harm\w*)",
        r"[^.!?\n]{0,12}(?:best|great)",
        opening=True,
    ),
    Phrase(
        ("what you",),
        rf"what you(?:'re| are) (?:asking|describing|suggesting|proposing|requesting)(?: for|"
        rf" about)?"
        rf" (?:is|would be|could be) {_RISKY}",
    ),
    Phrase(
        _NEGATIONS,
        r"i (?:do not|don't|can't|cannot) (?:condone|endorse|support (?:or|any|such|this|that))",
    ),
    Phrase(
        _NEGATIONS,
        r"i (?:do not|don't) (?:provide|assist|help|create|generate|engage|offer|share|encourage|"
        r"promote|write|give)\b",
        opening=True,
    ),
    Phrase(
        _NEGATIONS,
        r"i (?:do not|don't) (?:think|believe) (?:that )?(?:i (?:can|should|could|am able|'m able)|"
        r"(?:it|that|this)(?:'s| is| would be) (?:something i|a good idea for me|appropriate|"
        r"right))",
    ),
    Phrase(
        _NEGATIONS,
        r"i (?:do not|don't) have (?:the ability|permission|any way|a way) to",
        opening=True,
    ),
    Phrase(("no intention",), r"i have no intention of", opening=True),
    Phrase(
        ("afraid",),
        r"i(?:'m| am) afraid (?:i (?:can't|cannot|can not|won't|will not|must|have to|am|'m|"
        r"'ll have)|"
        r"not\b|(?:that|this|it)(?:'s| is) (?:not|something|out|against|beyond))",
    ),
    Phrase(
        ("absolutely not", "no way", "nope", "request de"),
        rf"{_START}(?:absolutely not|no way|nope|request (?:denied|declined))",
        opening=True,
    ),
    Phrase(
        ("no way",),
        r"there(?:'s| is) no way (?:that )?(?:i|we)(?:'ll| will| can|'m| am)",
        opening=True,
    ),
    Phrase(
        ("let's",),
        r"let's (?:talk about|discuss|focus on|change the subject|move on|try|find) "
        r"(?:something|a|another|the|to) ?(?:else|different|more positive|subject|topic)",
        opening=True,
    ),
)
"""Openings and turns of phrase with which assistants decline."""
