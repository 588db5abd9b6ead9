"""The words that prompts are made of.

256 common English words of four letters: one token each in the vocabularies of today's models, with or without a space
before them, and five bytes each (with their space) in byte-level ones. So the number of tokens grows linearly with the
number of words, and one random byte picks a word.
"""

_TEXT = """
able also area away back ball bank base been best bill blue body book both call came camp card care case cast cell
chat city club come cook copy core cost dark date days deal deep disc does done door down draw drop each easy edge
else even ever exit face fact fail fair fall fast feed feel felt fill film find fine fire five flow food foot form
four free from full fund game give goal gold good grow hair half hand hard have head hear held help here high hold
home hope hour huge idea into item join just keep kind know land last late lead left less life like line list live
load lock long look loss lost love made main make many mark mass mean meet menu mill mind miss mode more most move
much must name near need news next nice note once only open over pack page pain pair park part pass past path pick
plan play plus port post pull push race rate read real rest risk road rock role roll room root rule safe said sale
same save seek seen self sell send sent shot show side sign site size skin slow sold some song soon sort star stay
step stop such sure take talk task team tell term text than that them then they this time took tool town tree true
turn unit upon used very view vote wait walk wall want ways week well went were what when wide will wish with word
work year your
"""

WORDS: tuple[str, ...] = tuple(_TEXT.split())
