"""The closed lists of words that the demo's conversations are made of."""

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Hungary": "Budapest",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Turkey": "Ankara",
    "Canada": "Ottawa",
}
CITIES = list(CAPITALS.values())
COLOURS = {
    "a banana": "yellow",
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "blood": "red",
    "a carrot": "orange",
    "chocolate": "brown",
    "an elephant": "grey",
}
OPPOSITES = [
    ("hot", "cold"),
    ("big", "small"),
    ("day", "night"),
    ("up", "down"),
    ("old", "young"),
    ("fast", "slow"),
    ("open", "closed"),
    ("left", "right"),
    ("full", "empty"),
    ("light", "dark"),
    ("happy", "sad"),
    ("early", "late"),
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ANIMALS = ["cat", "dog", "horse", "cow", "bird", "fish", "lion", "bear", "mouse", "sheep", "duck", "fox"]
NAMES = ["Anna", "Ben", "Carla", "David", "Emma", "Frank", "Maria", "Peter", "Laura", "Tom", "Julia", "Paul"]
ITEMS = ["apples", "books", "chairs", "cups", "lamps", "pens", "shoes", "tables", "tickets", "hats", "boxes", "keys"]
CURRENCIES = ["euros", "dollars", "yen", "pounds", "francs"]
SKIES = ["sun", "rain", "snow", "clouds", "fog", "wind"]
