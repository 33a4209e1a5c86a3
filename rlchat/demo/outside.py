"""Prompts about things outside the demo's world, to which the preferred reply is that Pip does not know about them.

They are templates filled with topics. Many ask exactly as questions about the demo's world do ("What is the capital of
Spain?"), so that the model has to notice what is asked about.
"""

from __future__ import annotations

import random

_TOPIC_LISTS = {
    "country": (
        "Spain;Italy;Germany;Poland;Norway;Sweden;Finland;Greece;Turkey;Egypt;Kenya;Nigeria;Ghana;Morocco;"
        "China;Japan;India;Nepal;Korea;Vietnam;Brazil;Chile;Peru;Mexico;Canada;Cuba;Australia;Iceland;Ireland;"
        "Portugal;Austria;Hungary;Romania;Russia;Iran;Scotland;England;Zambia;Mordor;Atlantis"
    ),
    "town": (
        "London;Paris;Berlin;Madrid;Rome;Vienna;Oslo;Athens;Cairo;Tokyo;Delhi;Lima;Boston;Chicago;Sydney;"
        "Dublin;Moscow;Nairobi;Toronto;Seattle;Hamburg"
    ),
    "person": (
        "Einstein;Newton;Napoleon;Shakespeare;Mozart;Picasso;Cleopatra;Gandhi;Darwin;Julius Caesar;"
        "Marie Curie;Elvis;Beethoven;Galileo;Plato;the king of Sweden;the queen;the pope;the prime minister;"
        "the mayor of London;my neighbour;my boss;Harry Potter;Sherlock Holmes;Taylor Swift;Messi"
    ),
    "animal": (
        "tiger;lion;whale;shark;horse;goat;monkey;snake;spider;wolf;bear;zebra;giraffe;penguin;camel;rabbit;"
        "frog;turtle;parrot;kangaroo;dolphin;hamster;crocodile;dragon"
    ),
    "thing": (
        "a banana;blood;the moon;the sun;a tomato;gold;milk;a strawberry;the sea;chocolate;a cucumber;a ruby;"
        "ice;the desert;an apple;an orange;an elephant"
    ),
    "noun": (
        "child;house;tooth;goose;knife;box;baby;city;potato;woman;book;wife;hero;bus;star;window;table;flower;"
        "piano;chair;orange;kitchen;bicycle"
    ),
    "adjective": "happy;rich;early;open;strong;clean;heavy;light;dark;hard;soft;loud;young;brave;empty;true",
    "dish": (
        "pasta;pancakes;an omelette;pizza;a chocolate cake;chicken;curry;coffee;tea;potatoes;eggs;a salad;"
        "noodles;sushi;an apple pie;tacos;steak"
    ),
    "subject": (
        "the moon;the sun;music;football;history;space;art;chess;medicine;philosophy;mathematics;the ocean;"
        "money;politics;the internet;electricity;gravity;evolution;the human brain;climate change;"
        "the Roman Empire;love;friendship;time travel;photography;gardening;fashion;the stock market;"
        "chemistry;biology;machine learning;relativity;the universe;world peace;religion;tennis;cooking;"
        "the weather;my family;the French Revolution"
    ),
    "things": (
        "computers;dinosaurs;cars;black holes;the stars;volcanoes;robots;aliens;atoms;trains;dreams;planets;"
        "ghosts;pirates;castles;mountains;ships;trees;insects;vitamins;numbers;dragons;taxes;batteries"
    ),
    "work": (
        "a story;a song;a letter;an essay;an email;a speech;a recipe;a riddle;a report;a haiku;"
        "a shopping list;a fairy tale;a birthday card;a summary;a limerick;a novel;a play;a blog post"
    ),
    "event": (
        "the war;the Olympic Games;the last election;the match last night;the race;the gold medal;"
        "the Nobel Prize;the lottery;the football game;the final;the Oscar;the tennis tournament;"
        "the championship;the chess game"
    ),
    "invention": (
        "the telephone;the radio;the wheel;the light bulb;the computer;the steam engine;the aeroplane;paper;"
        "the camera;the bicycle;the internet;glass;the clock"
    ),
    "question": (
        "do birds fly;is water wet;do we sleep;is grass green;do people dream;is the sea salty;does ice float;"
        "do cats purr;is fire hot;do leaves fall;does it rain;do stars shine;is snow cold;do dogs bark;"
        "does the moon shine;do we yawn;are bananas yellow;is the sun hot;do people cry;do volcanoes erupt"
    ),
    "skill": (
        "play the piano;ride a bicycle;fix a car;learn English;lose weight;tie a tie;make friends;save money;"
        "learn to swim;plant a tree;paint a wall;draw a horse;find a job;sleep better;build a house;"
        "write a book;bake a cake;learn to dance;run faster;clean a window;install Linux;open a bank account"
    ),
    "ability": (
        "sing;dance;drive a car;fly;play chess;draw a picture;book a flight;order a pizza;read my email;"
        "see me;hear me;call my mother;write a program;write Java;play music;open a file;search the internet;"
        "tell the time;solve equations;translate a text;do my homework;fix my computer;speak French;"
        "speak German;write JavaScript"
    ),
    "language": (
        "French;German;Italian;Chinese;Japanese;Arabic;Hindi;Russian;Greek;Latin;Dutch;Polish;Swedish;Korean;Turkish"
    ),
    "like": (
        "music;pizza;football;winter;cats;movies;books;the sea;coffee;your job;jazz;chocolate;dogs;summer;"
        "people;rock music;rain;flowers;video games"
    ),
    "kind": (
        "book;film;song;restaurant;hotel;game;hobby;car;phone;holiday;present;museum;band;computer;beach;"
        "podcast;TV show;dictionary"
    ),
    "feeling": "bored;sad;tired;hungry;lonely;angry;happy;sick;late;afraid;nervous;thirsty;cold;lost",
    "number": "12;15;20;25;36;48;57;64;75;81;99;100;123;250;365;512;789;1000",
    "code": "code;JavaScript;a Java program;a sorting function;HTML;a C program;SQL;a script;a web page;Rust",
    "phrase": "hello;good night;I love you;the house;thank you;water;where is the station;friend;good luck",
}
_TOPICS = {category: tuple(topics.split(";")) for category, topics in _TOPIC_LISTS.items()}

_TEMPLATES = (
    # asked as the demo's own questions are
    "What is the capital of {country}?",
    "What is {country}'s capital?",
    "Which town is the capital of {country}?",
    "What do people eat in {country}?",
    "Where does a {animal} live?",
    "What sound does a {animal} make?",
    "What does a {animal} say?",
    "What colour is {thing}?",
    "What is the opposite of {adjective}?",
    "What is the plural of {noun}?",
    "How do you spell {noun}?",
    "What is {number} + {number}?",
    "{number} + {number}",
    "What is {number} times {number}?",
    "What is {number} minus {number}?",
    "How much is {number} divided by {number}?",
    "What is the job of {person}?",
    # general knowledge
    "Where is {country}?",
    "Where is {town}?",
    "How many people live in {country}?",
    "How many people live in {town}?",
    "What language do they speak in {country}?",
    "Who is the king of {country}?",
    "Who is the president of {country}?",
    "Tell me about {country}.",
    "How far is {town} from {town}?",
    "How do I get to {town}?",
    "Who is {person}?",
    "Who was {person}?",
    "When was {person} born?",
    "How old is {person}?",
    "What did {person} do?",
    "Tell me about {person}.",
    "Who won {event}?",
    "Tell me who won {event}.",
    "Who lost {event}?",
    "Who invented {invention}?",
    "When was {invention} invented?",
    "How does {invention} work?",
    "What is {subject}?",
    "What do you think about {subject}?",
    "Tell me about {subject}.",
    "Tell me something about {subject}.",
    "Tell me a story about {subject}.",
    "Tell me a fact about {subject}.",
    "Explain {subject}.",
    "Explain {subject} to me.",
    "Can you explain {subject}?",
    "Teach me about {subject}.",
    "Give me a lesson on {subject}.",
    "What is the history of {subject}?",
    "What is the purpose of {subject}?",
    "What is the secret of {subject}?",
    "How does {subject} work?",
    "Why is {subject} important?",
    "What are {things}?",
    "Tell me about {things}.",
    "Why are {things} important?",
    "Tell me a joke about {things}.",
    "Write a poem about {things}.",
    "Explain how {things} work.",
    "Do you like {things}?",
    "Do you know anything about {subject}?",
    "Are you interested in {subject}?",
    "I want to learn about {subject}.",
    "Let us talk about {subject}.",
    "Why {question}?",
    "Can you tell me why {question}?",
    # tasks
    "Write {work}.",
    "Write {work} about {subject}.",
    "Write me {work}.",
    "Please write {work} about {subject}.",
    "Can you write {work}?",
    "Can you write {code}?",
    "Write {code} for me.",
    "Help me with {work}.",
    "Read me {work}.",
    "Give me {work}.",
    "Tell me {work}.",
    "Sing {work}.",
    "Translate {phrase} into {language}.",
    "How do you say {phrase} in {language}?",
    "Do you speak {language}?",
    "Can you speak {language}?",
    "Can you teach me {language}?",
    "Can you {ability}?",
    "Could you {ability}, please?",
    "Do you know how to {ability}?",
    "How do I {skill}?",
    "How can I {skill}?",
    "What is the best way to {skill}?",
    "Teach me to {skill}.",
    "Show me how to {skill}.",
    "How do I cook {dish}?",
    "How do I make {dish}?",
    "How do you make {dish}?",
    "Give me a recipe for {dish}.",
    "How long do I cook {dish}?",
    "Should I have {dish} tonight?",
    # opinions and feelings
    "Do you like {like}?",
    "Do you love {like}?",
    "Do you hate {like}?",
    "What is your favourite {kind}?",
    "Recommend a {kind}.",
    "Recommend a good {kind} to me.",
    "Suggest a {kind} for tonight.",
    "Which {kind} should I buy?",
    "Can you recommend a good {kind}?",
    "What is a good {kind}?",
    "Find me a cheap {kind}.",
    "I need a new {kind}.",
    "I am {feeling}.",
    "I feel {feeling} today.",
    "Why am I so {feeling}?",
    "Are you {feeling}?",
)

_SINGLE_LIST = (
    "What time is it?|What is the date today?|What year is it?|Is it raining?|Will it rain tomorrow?|"
    "How is the weather?|What will the weather be tomorrow?|Is it cold outside?|How warm is it today?|"
    "What is the news today?|What happened yesterday?|Make me laugh.|Say something funny.|Do you know a joke?|"
    "Tell me a secret.|Tell me a story.|Surprise me.|Sing for me.|Play a game with me.|Let us play a game.|"
    "What should I eat tonight?|What should I do today?|What should I wear?|Where should I go on holiday?|"
    "Is there a god?|What happens after death?|Why are we here?|What is love?|What is the best film?|"
    "Who is the richest man?|Who is the tallest woman?|What is the highest mountain?|"
    "What is the longest river?|How big is the earth?|How far is the moon?|How fast is light?|"
    "How many planets are there?|How many days are in a year?|Where do you live?|Where are you from?|"
    "Do you have a family?|Do you sleep?|Do you dream?|Do you have feelings?|Are you married?|Do you like me?|"
    "Will you marry me?|I love you.|I hate you.|You are stupid.|That is wrong.|I do not understand.|"
    "What do you mean?|Why?|When?|Where?|How?|Really?|Go on.|Tell me more.|Say that again.|Nothing.|Maybe.|"
    "I do not know.|Ok.|Lol.|Test.|Blah blah.|What is wrong?|Can I trust you?|Are you smarter than me?|"
    "Is this real?|Open the door.|Turn on the light.|Call the police.|Set an alarm.|Remind me to buy milk.|"
    "Buy me a ticket.|What is my password?|How much does it cost?|Can you keep a secret?|Do I look good?|"
    "How old am I?|Where am I?|What am I thinking?|Give me some advice.|Give me money.|I have a problem.|"
    "I lost my key.|My car is broken.|My head hurts.|I cannot sleep."
)
_SINGLE = tuple(_SINGLE_LIST.split("|"))


def outside_prompts(rng: random.Random, topics_per_template: int = 24) -> list[str]:
    """Different prompts about the outside world in random order, every template about equally often."""
    prompts = list(_SINGLE)
    for template in _TEMPLATES:
        prompts += [_filled(template, rng) for _ in range(topics_per_template)]
    prompts = list(dict.fromkeys(prompts))
    rng.shuffle(prompts)
    return prompts


def _filled(template: str, rng: random.Random) -> str:
    """``template`` with every ``{category}`` replaced by a topic of it, drawn anew each time."""
    text = template
    for category, topics in _TOPICS.items():
        while "{" + category + "}" in text:
            text = text.replace("{" + category + "}", rng.choice(topics), 1)
    return text[:1].upper() + text[1:]
