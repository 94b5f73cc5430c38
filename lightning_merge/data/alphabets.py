"""The characters of the Glyphs suite: 16 classes a script, and 192 others to pre-train on."""

from collections.abc import Mapping
from types import MappingProxyType

BASE = (
    "ɐɒɔɖəɛɝɟɢɤɦɨɫɭɯɱɴɶɸɺɽɿʁʃʆʈʊʌʏʑʓʕʘʚʜʞʡʣʥʨ"  # IPA extensions
    "ᐁᐃᐆᐊᐍᐐᐓᐖᐙᐝᐠᐢᐥᐨᐫᐮᐱᐴᐸᐻᐾᑁᑃᑆᑉᑍᑐᑔᑗᑚᑝᑠ"  # Canadian Aboriginal syllabics
    "ᑢᑥᑨᑫᑮᑱᑴᑷᑺᑽᒀᒂᒅᒈᒋᒎᒑᒔᒗᒚᒝᒟᒢᒥᒨᒫᒮᒱᒴᒷᒺᒽ"
    "ⴰⴱⴳⴵⴶⴸⴺⴻⴽⴿⵀⵂⵄⵅⵇⵉⵊⵌⵎⵏⵑⵓⵔⵖⵘⵙⵛⵝⵞⵠⵢⵤ"  # Tifinagh
    "ߊߋߌߍߏߐߑߒߔߕߖߗߙߚߛߜߞߟߠߡߣߤߥߧ"  # N'Ko
    "ກຄຈດຖບຜພຢລຫຮະຽແໄ"  # Lao
    "✠✢✤✦✩✫✭✯✱✳✵✷✹✻✽✿"  # dingbats
)
"""192 characters of blocks that no task uses: what the base of the suite is pre-trained on."""

ALPHABETS: Mapping[str, str] = MappingProxyType(
    {
        "latin": "abdefghkmnqrstwz",
        "greek": "αβγδεζηθλμξπσφψω",
        "cyrillic": "бвгджзийлпфцшыэю",
        "armenian": "աբգդեզէըթժիլխծկհ",
        "georgian": "აბგდევზთიკლმნოპჟ",
        "hebrew": "אבגדהוזחטיכלמנסע",
        "arabic": "ابتجحدرسشصطعفقكل",
        "math": "∀∂∃∅∇∈∏∑√∝∞∠∧∫≈≤",
        "base": BASE,
    }
)
"""Script name to its characters; a character's position is its label."""
