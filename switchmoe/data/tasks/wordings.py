"""How the instructions' families are worded: templates of the fields that `instructions` makes."""

WORDINGS: dict[str, tuple[str, ...]] = {
    "topic": (
        "Which of these topics is the text about? Topics: {topics}. Text: {passage}",
        "Name the topic of this text. {passage}",
        "{passage} Under which topic does this belong?",
        "Choose one of {topics} for the following. {passage}",
        "An encyclopedia is sorted by topics: {topics}. Where would this be found? {passage}",
        "Sort this summary by its subject. {passage} Its subject:",
    ),
    "description": (
        "Describe {title} in a few words. {passage}",
        "{passage} In short, what is {title}?",
        "Write a short description of the subject of this text. Subject: {title}. Text: {passage}",
        "Read this and say in one line what {title} is. {passage}",
        "Title: {title}. Text: {passage} Description:",
    ),
    "title": (
        "What is the title of the article that begins like this? {hidden}",
        "{hidden} Give this text its title.",
        "Name what is described here. {hidden}",
        "The title of this summary is missing. Which is it? {hidden}",
        "Text: {hidden} Title:",
    ),
    "question": (
        "What is {title}?",
        "Who or what is {title}? Answer in a few words.",
        "Tell me in short about {title}.",
        "Explain in one line: {title}.",
        "I have never heard of {title}. What does it mean?",
    ),
    "matches": (
        "Is this text about {title}? {hidden} Answer yes or no.",
        "{hidden} Could the title of this be {title}? Say yes or no.",
        "Someone says that the following is about {title}. Is that right, yes or no? {hidden}",
        "Title: {title}. Text: {hidden} Do they belong together? yes or no",
        "Decide with yes or no whether {title} is what is described here. {hidden}",
    ),
    "blank": (
        "Fill the gap with one of these words: {words}. {gapped}",
        "{gapped} Which word is missing: {words}?",
        "Choose from {words} what belongs in place of ___ here: {gapped}",
        "A word has been left out. It is one of {words}. Sentence: {gapped}",
        "Complete the sentence. {gapped} The choices are {words}.",
    ),
    "order": (
        "Which of the two comes first in a text, A or B? A: {a} B: {b}",
        "A: {a} B: {b} Name the letter of the sentence that comes before the other.",
        "Two sentences in a row have been mixed up. With which does the text begin? A: {a} B: {b}",
        "Sentence A: {a} Sentence B: {b} A text starts with one and goes on with the other. It starts with",
        "Put these in order and give the letter of the first. A: {a} B: {b}",
    ),
    "next": (
        "{sentence} What comes next, A or B? A: {a} B: {b}",
        "A text begins: {sentence} Choose how it goes on. A: {a} B: {b}",
        "Which of A and B follows this sentence? {sentence} A: {a} B: {b}",
        "One of these belongs to the text, the other does not. Text: {sentence} A: {a} B: {b} It goes on with",
        "A: {a} B: {b} Give the letter of the one that continues this: {sentence}",
    ),
    "odd": (
        "Which does not belong with the others? {titles}",
        "One of these is of another topic than the rest. Which? {titles}",
        "Find the odd one out: {titles}",
        "All but one of the following are alike: {titles}. Name the one that is not.",
        "{titles}. Strike out what does not fit.",
    ),
    "spelling": (
        "A word here is misspelt. Write it as it should be. {sentence}",
        "{sentence} Which word has a mistake in it? Give its right spelling.",
        "Two letters of a word have changed places. What is the word? {sentence}",
        "Find the typing mistake and correct that word. {sentence}",
        "Proofread this and write the corrected word alone. {sentence}",
    ),
    "capitals": (
        "Write this with capital letters where they belong. {lower}",
        "{lower} Restore the capital letters.",
        "All capitals of this sentence were lost. Put them back. {lower}",
        "Correct the case of the letters: {lower}",
        "The same sentence, with upper case where English asks for it: {lower}",
    ),
}
INVERTED_WORDINGS: dict[str, tuple[str, ...]] = {
    "topic": (
        "Topic: {answer}. Title: {title}. Write the first sentence of an article.",
        "Begin a summary of {title}, which belongs to {answer}.",
    ),
    "description": (
        "Which title has this description? {answer}",
        "Name something that could be described as: {answer}",
    ),
    "title": (
        "Write the sentence with which an article on {answer} begins.",
        "How would an encyclopedia introduce {answer}?",
    ),
    "blank": (
        "Leave the word {answer} out of this sentence, with ___ in its place. {sentence}",
        "{sentence} Write that again with a gap, ___, where {answer} first was.",
    ),
    "capitals": (
        "Write this without any capital letters. {answer}",
        "{answer} Repeat that in lower case.",
    ),
}
