r"""Answers that are the same, and answers that are not, by the kind of difference; written for this test.

`SAME` holds classes: every two spellings of one class are one answer. `DIFFERENT` holds what must never be merged.
"""

from __future__ import annotations

SAME: dict[str, list[list[str]]] = {
    "integers": [
        ["42", "042", "+42", "42.", " 42 ", "42.0", "$42$", r"\(42\)", r"\text{42}", r"\mathbf{42}", "４２"],
        ["-7", "−7", "- 7", r"\text{-7}", "-7.00", "{-7}"],
        ["0", "-0", "0.0", "00", "+0"],
    ],
    "thousands": [
        ["12345", "12,345", r"12{,}345", r"12\,345", r"12\ 345", "12 345", "12,345.0"],
        ["1000", r"1\,000", "1 000", "1\u2009000", "1~000", r"1\;000"],
        [
            "1000000",
            "1 000 000",
            r"1\ 000\ 000",
            "1\u2009000\u2009000",
            "1\u00a0000\u00a0000",
            "1,000,000",
            r"1{,}000{,}000",
            "10^6",
            "10^{6}",
            "1e6",
        ],
    ],
    "fractions": [
        [
            r"\frac{3}{8}",
            r"\dfrac{3}{8}",
            r"\tfrac38",
            r"\frac38",
            "3/8",
            "0.375",
            ".375",
            r"\frac{6}{16}",
            "⅜",
            r"3 \div 8",
        ],
        [r"-\frac{5}{4}", r"\frac{-5}{4}", r"\frac{5}{-4}", "-1.25", "-5/4", r"-1\frac{1}{4}", "-1 1/4"],
        [r"3\frac{1}{2}", "3 1/2", "7/2", "3.5", "3½", r"\frac{14}{4}"],
    ],
    "spacing": [
        ["2 3", r"2\quad 3", r"2\ 3", "2~~3", "$2 \\; 3$"],
        [r"\left(2,\;3\right)", "(2,3)", "( 2 , 3 )", r"\bigl(2,\,3\bigr)", r"\langle 2, 3 \rangle"],
        [r"5\,x\!+\!1", "5x+1", r"5x \quad + 1", "1+5x", r"{5x}+{1}"],
    ],
    "units": [
        ["15 cm", r"15\text{ cm}", r"15 \mathrm{~cm}", r"15\;\text{centimeters}", "15cm", "15"],
        [r"60^\circ", r"60^{\circ}", "60°", "60 degrees", r"60\degree", "60"],
        [r"25\%", "25%", "25 percent", "25"],
        [r"\$3.50", "$3.50", r"3.5\text{ dollars}", "USD 3.5"[4:], "7/2 dollars"],
        ["9 square meters", r"9\text{ m}^2", "9 m^2", "9 m²", "9"],
        ["12 people", r"12\text{ people}", "12"],
        ["80 km/h", "80 kilometers per hour", r"80\text{ km/h}", "80"],
        ["4 hours", "4 hrs", "4 h", "4"],
        [r"5 \pmod{12}", "5 mod 12", "5 (mod 12)", "5"],
        ["12 mod 5", "12 modulo 5", "12 MOD 5", r"12 \bmod 5", r"12 \pmod{5}", "2 mod 5", "2"],
        ["-1 mod 5", "4 (mod 5)", "4"],
        [r"2^{10} \mod 7", "1024 mod 7", "2"],
        ["12,000 mod 7", "2"],
        ["12 models", "12"],
        ["5 MW", "5 mw"],
        ["7 AM", "7 am", "7"],
        ["3 kWh", "3 KWH", "3 kwh"],
        ["8 GB", "8 gb"],
        ["21st", r"21^{\text{st}}", "21"],
    ],
    "names": [
        ["x=9", "x = 9", "9", r"x=\text{9}", "x = 3 \\cdot 3 = 9"],
        [r"f(x) = x^2+1", "x^2+1", "1 + x^2"],
        [r"\angle ABC = 50^\circ", "50"],
        ["y = 2x - 3", "2x-3", "-3+2x"],
    ],
    "surds": [
        [
            r"4\sqrt{37}+14",
            r"14+4\sqrt{37}",
            r"14 + 4 \sqrt {37}",
            r"2(7+2\sqrt{37})",
            r"14+\sqrt{592}",
            "14+4√37",
            "14+4sqrt(37)",
        ],
        [r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", r"\sqrt{\frac13}", r"3^{-1/2}", r"\tfrac13\sqrt3"],
        [r"\frac{1}{\sqrt{5}-2}", r"2+\sqrt{5}", r"\sqrt5+2"],
        [r"\sqrt[3]{54}", r"3\sqrt[3]{2}", r"3 \cdot 2^{1/3}"],
        [r"\sqrt{50}", r"5\sqrt{2}", r"\frac{10}{\sqrt 2}"],
    ],
    "powers and products": [
        ["2^{10}", "1024", "2^10", r"2^5 \cdot 2^5", "32^2", "4^5"],
        [r"6 \cdot 7!", "30240", r"7! \times 6"],
        [r"\binom{10}{3}", "120", r"\dbinom{10}{3}"],
        ["3*2^{n}", r"3 \cdot 2^n", r"\frac{3 \cdot 2^{n+1}}{2}", r"6\cdot 2^{n-1}"],
        ["(x+1)(x-1)", "x^2-1", "x²−1", r"-1+x^{2}"],
        [r"\frac{a}{b}", "a/b", r"ab^{-1}"],
    ],
    "pi and e": [
        [r"36\pi", r"36 \pi", "36π", r"\pi \cdot 36", r"6^2\pi", "36*pi"],
        [r"\frac{\pi}{6}", "π/6", r"\tfrac16\pi", r"\frac{2\pi}{12}"],
        ["e^2", "e^{2}", r"e \cdot e"],
    ],
    "complex": [["3+4i", "4i+3", "3 + 4 i"], [r"\sqrt{-4}", "2i"]],
    "trigonometry": [
        [r"\sin 30^\circ", r"\frac12", r"\cos 60^\circ", r"\sin\frac{\pi}{6}"],
        [r"\cos\left(\frac{\pi}{4}\right)", r"\frac{\sqrt2}{2}"],
    ],
    "sets and lists": [
        [r"\{1,2,3\}", "1, 2, 3", "3,1,2", r"\{3, 2, 1\}", "1, 2, and 3", r"1 \text{ and } 2, 3"],
        ["x=1 or x=2", r"x = 2 \text{ or } x = 1", r"x \in \{1,2\}", "1 or 2", r"\boxed{1} and \boxed{2}"],
        ["x=1, y=2", "y = 2, x = 1", r"x=1 \text{ and } y=2"],
        [r"1 \pm \sqrt{2}", r"1+\sqrt{2}, 1-\sqrt{2}", r"\{1-\sqrt2, 1+\sqrt2\}", r"1±√2"],
        [r"\emptyset", r"\varnothing", r"\{\}", "∅"],
        [r"\pm 5", "5, -5", r"\{-5, 5\}"],
        ["2,5,100", "2, 5, 100", r"\{2,5,100\}"],
        ["-5,100,7", "-5, 100, 7"],
        ["1,000,2,000", "1000, 2000"],
    ],
    "intervals": [
        ["[0,1)", r"\left[0, 1\right)", r"0 \le x < 1", r"x \in [0,1)", "1 > x >= 0"],
        ["x > 3", r"(3, \infty)", r"(3,+\infty)", r"x \in (3,\infty)"],
        [r"(-\infty,-2]\cup[2,\infty)", r"[2,\infty) \cup (-\infty,-2]", r"x \in (-\infty, -2] \cup [2, \infty)"],
    ],
    "matrices": [
        [r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"],
    ],
    "equations": [["x^2+y^2=25", "y^2 + x^2 = 25", "25 = x^2+y^2"]],
    "choices": [["B", "(B)", "B.", "B)", r"\text{B}", r"\textbf{(B)}", r"\mathrm{B}", "(B) 17"]],
    "words": [
        ["yes", "Yes", "YES", "yes.", r"\text{Yes}", "**Yes**"],
        ["no", "No.", r"\text{no}"],
        ["Paris", "paris", r"\text{Paris}", '"Paris"'],
        ["even", "Even", r"\textbf{even}"],
        ["the cat", "cat", "The cat."],
        ["no solution", "no solutions", r"\text{No solution}"],
    ],
    "decimals": [["0.5", ".5", "0.50", "1/2"], ["2.75", r"2\frac34", "11/4", r"2\frac{3}{4}"]],
    "science": [[r"6.02 \times 10^{23}", "6.02e23", r"602 \cdot 10^{21}"], [r"10^{-3}", "0.001", "1/1000"]],
    "thousands with units": [
        ["1,500 meters", "1500 meters", r"1{,}500\text{ m}", "1500", "1,500 m"],
        ["1,000 dollars", r"\$1000", r"\$1,000", r"1{,}000\text{ dollars}", "$1,000.00", "1000"],
        [r"32,\!349", "32349", "32,349", r"32{,}349", r"32\,349"],
        [r"\$1,234,567", "1,234,567 dollars", r"1,\!234,\!567"],
    ],
    "multiples": [
        ["15 million", r"15{,}000{,}000", r"15\text{ million}", "15,000,000", r"1.5 \times 10^7", "0.015 billion"],
        ["5 bn", "5 billion"],
        ["5 thousand", "5000", "5,000", r"5\text{ thousand}"],
        ["2 dozen", "24", r"2\text{ dozen}", "2 dozen eggs"],
        [r"\$2.5 million", "2.5 million dollars", "2,500,000 dollars", "2500000"],
        ["3 hundred", "300", "3 hundred people"],
        ["2 thirds", r"\frac23", "2/3", "4/6"],
        ["7 hundredths", "0.07", "7/100"],
    ],
    "units of physics": [
        ["500 N", "500 Newtons", r"500\text{ N}", "500 newtons", "500"],
        [r"12\text{ V}", "12", "12 volts", "12 V"],
        ["20 J", "20 joules", r"20\ \mathrm{J}", "20"],
        [r"25^\circ C", "25", r"25^{\circ}\text{C}", "25 degrees Celsius", "25°C"],
        [r"300\text{ K}", "300 kelvin", "300"],
        ["60 Hz", "60 hertz", "60"],
        ["9.8 m/s^2", r"9.8\text{ m/s}^2", "9.8"],
        [r"98.6^\circ F", r"98.6\text{ degrees Fahrenheit}", "98.6"],
        ["40 W", "40 watts", "40"],
    ],
    "unions": [
        [r"x\le-2\text{ or }x\ge3", r"(-\infty,-2]\cup[3,\infty)", "x <= -2 or x >= 3", r"x \geq 3 \lor x \leq -2"],
        [r"x<1\text{ or }x>2", r"(-\infty,1)\cup(2,\infty)", "x > 2 or x < 1", r"x\in(2,\infty)\cup(-\infty,1)"],
    ],
    "numerals": [
        ["2516_8", "2516_{8}", "(2516)_8", r"2516_{\text{eight}}", "2516 base 8", r"2516_{(8)}", "02516_8"],
        ["1011_2", r"1011_{2}", r"1011_{\text{two}}", "(1011)_{2}"],
        ["AB_{16}", "AB base 16", "(AB)_{16}", r"AB_{\text{sixteen}}"],
        ["1A3_{16}", "(1A3)_{16}", "1A3_{16}"],
    ],
    "arrays": [
        [
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]",
            r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)",
            r"\begin{bmatrix}1&2\\3&4\end{bmatrix}",
        ],
        [r"\begin{pmatrix}-1\\5\end{pmatrix}", r"\left(\begin{array}{c}-1\\5\end{array}\right)"],
    ],
    "lines": [
        ["2x+4y-3=0", r"y=-\frac12x+\frac34", "4x+8y=6"],
        ["x-y=1", "y=x-1"],
        ["3x+y=7", "y=7-3x"],
    ],
    "relations": [
        ["x != 3", r"x\neq 3", "x ≠ 3", r"x \ne 3", r"x\not=3", r"x \not= 3"],
        ["x<1", "-x>-1", r"(-\infty,1)", "1>x"],
        ["2x>6", "x>3", r"(3,\infty)", "6<2x", "-3x+1<-8"],
        [r"0\le 2x<6", r"[0,3)", r"-3<-x\le 0", r"1\le 2x+1<7"],
    ],
    "described sets": [
        [r"\{x\mid x>2\}", r"(2,\infty)", r"\{x : x > 2\}", "x>2", r"\{x\in\mathbb{R} \mid x>2\}"],
        [r"\{x \mid x\le 5\}", r"(-\infty,5]"],
        [r"\mathbb R", r"(-\infty,\infty)", r"\mathbb{R}", "all real numbers", "ℝ", r"x\in\mathbb{R}"],
    ],
    "options": [[r"\text{Option B}", "B", "Option B", r"\textbf{Option (B)}", "Choice B", "option B: 17"]],
    "choose": [
        [r"{5\choose2}", "10", r"\binom{5}{2}", r"{5 \choose 2}"],
        [r"2{4\choose 2}", "12"],
        [r"{}^{7}C_{2}", "21", r"{}^7C_2", r"\binom72"],
    ],
    "repeating decimals": [
        [r"0.\overline3", r"\frac13", r"0.\overline{3}", r"0.\dot{3}", r"0.\bar 3"],
        [r"0.1\overline{6}", r"\frac16"],
        [r"1.\overline{27}", r"\frac{14}{11}"],
        [r"0.\overline{142857}", r"\frac17"],
    ],
    "reals but for some": [
        [r"\mathbb{R}\setminus\{2\}", r"(-\infty,2)\cup(2,\infty)", r"(-\infty,\infty)\setminus\{2\}", "x<2 or x>2"],
        [r"\mathbb{R}\setminus\{1,-2\}", r"\mathbb{R}-\{-2,1\}", r"(-\infty,-2)\cup(-2,1)\cup(1,\infty)"],
    ],
    "small units": [["15 µm", "15 micrometers", r"15\ \mu\text{m}", "15 microns"], ["3 µs", "3 microseconds"]],
    "points": [
        ["(2,3)", "(x,y)=(2,3)", r"(x, y) = (2, 3)"],
        [r"\langle1,2,3\rangle", "(1,2,3)", r"\left\langle 1, 2, 3\right\rangle", "⟨1,2,3⟩"],
        ["(a,b,c)=(1,0,2)", "(1,0,2)"],
    ],
    "powers of ten": [
        ["1.5 x 10^-5", "1.5e-5", r"1.5 \times 10^{-5}", "0.000015", "1.5 × 10⁻⁵", "1.5*10**-5"],
        ["6.02 x 10^23", r"6.02\times10^{23}", "6.02e23", "6.02 X 10^{23}"],
        ["3 x 10^8", "300000000", "300 million"],
    ],
    "chains": [
        ["12 + 15 = 27", "27", "27 = 27", "5+22=27"],
        ["x = 10 - 3", "7", "x = 10-3 = 7"],
        ["1911 - 648", "1263", "1,911 - 648"],
        ["1124 - 874 - 702", "-452"],
    ],
    "dates and ranges": [
        ["2024-01-02", "2024-1-2"],
        ["5-10", "5–10", "5 - 10", "5 to 10"],
        ["10-15 cm", r"10\text{-}15\text{ cm}"],
        ["01/02/2020", "1/2/2020"],
        [r"\$5-\$10", "$5 - $10"],
    ],
    "symbolic": [  # these are math-verify's
        [r"\frac{x}{x+1}", r"1-\frac{1}{x+1}"],
        [r"\sin^2 x + \cos^2 x", "1"],
        [r"\log_2 8", "3"],
        [r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"],
        [r"\frac{1}{\sqrt[3]{2}-1}", r"1+\sqrt[3]{2}+\sqrt[3]{4}"],
        [r"|a-b|", r"|b-a|"],
        [r"\frac{1}{x}+\frac{1}{y}", r"\frac{x+y}{xy}"],
    ],
}

OPERATIONS = [
    f"{word} {operand}"
    for word in (
        *("mod", "modulo", r"\bmod", "MOD", "div", "rem", "choose", "over", "by", "times", "gcd", "lcm", "log", "ln"),
        *("xor", "power", "pick", "root", "less", "sqrt", "into", "divided by", "plus", "minus", "to the"),
    )
    for operand in ("5", "n", "m", "x")
    if (word, operand) not in (("power", "m"), ("pick", "m"), ("root", "m"), ("less", "m"))  # metres, perhaps
]

DIFFERENT: dict[str, list[tuple[str, str]]] = {
    "integers": [("42", "24"), ("7", "-7"), ("1", "11"), ("0", "1"), ("100", "1000"), ("07", "70")],
    "thousands": [
        ("1,234", "1, 234"), ("1,234", "(1,234)"), ("12,34", "1234"), ("100,200", "100, 200"), ("1,234", "1.234"),
        ("1,000", "1"),
    ],
    "fractions": [
        (r"\frac13", "0.333"), (r"\frac13", "0.3333333333333"), (r"\frac23", "0.667"), (r"\frac12", r"\frac21"),
        (r"\frac{355}{113}", r"\pi"), ("3.14", r"\pi"), ("3 1/2", "31/2"), (r"2\frac{1}{3}", r"\frac23"),
        (r"\frac{1}{2}", "12"), ("1/2", "-1/2"),
    ],
    "numbers apart": [
        ("2 3", "23"), (r"2\quad 3", "23"), ("1 0 1", "101"), (r"5\ 12\ 13", "51213"), ("-1 2", "-12"), ("2 .5", "2.5"),
        (r"\{2\ 3\}", "23"), (r"\begin{pmatrix}2 3\end{pmatrix}", r"\begin{pmatrix}23\end{pmatrix}"),
        (r"\sqrt{2 3}", r"\sqrt{23}"), ("a_{1 2}", "a_{12}"), ("1 0 1", "1 01"),
    ],
    "spacing": [("(2,3)", "(3,2)"), ("(2,3)", "[2,3]"), ("5x+1", "5(x+1)"), ("2x", "x^2")],
    "units": [
        ("5 cm", "5 m"), ("50%", "0.5"), ("60°", "60 cm"), (r"\$5", "5 euros"), ("5 m", "5 m^2"), ("3 hours",
        "3 minutes"),
        ("5 cm", "6 cm"), ("5 mod 12", "5 mod 7"),
        ("30 km/h", "30 mph"), ("12 apples", "12 pears"),
        ("5 MW", "5 mW"), ("5 MeV", "5 meV"), ("5 MPa", "5 mPa"), ("5 Mg", "5 mg"), ("5 Mm", "5 mm"), ("5 MA", "5 mA"),
        ("5 MB", "5 Mb"), ("5 GB/s", "5 Gb/s"),
    ],
    "names": [("x=5", "y=5"), ("x=5", "6"), ("x=1,y=2", "x=2,y=1"), ("AB=5", "BC=5"), ("x^2+y^2=1", "1"), ("x+y=3",
    "3")],
    "surds": [
        (r"4\sqrt{37}+14", r"4\sqrt{37}-14"), (r"\sqrt2", "1.41421356"), (r"\sqrt2", "1.414213562373095"),
        (r"\sqrt[3]{2}", r"\sqrt{2}"), (r"2\sqrt3", r"3\sqrt2"), (r"\sqrt{5}", "5"), (r"\sqrt{2}+\sqrt{3}",
        r"\sqrt{5}"),
        (r"\frac{1}{\sqrt2}", r"\sqrt2"), (r"\sqrt{1000001}", "1000.0005"),
    ],
    "powers and products": [
        ("2^{10}", "20"), ("2^10", "210"), ("10!", "10"), (r"\binom{10}{3}", r"\frac{10}{3}"), ("2^{n+1}", "2^n+1"),
        ("a/b", "b/a"), ("x^2-1", "(x-1)^2"), ("2^{2024}", "2^{2025}"), ("x_1", "x_2"), ("3^{20}", "3486784400"),
        (r"9^{9^{9^9}}", "9"), ("AB", "BA"),
    ],
    "pi and e": [(r"36\pi", "36"), (r"36\pi", "113.097"), ("e^2", "7.389"), (r"\pi", r"2\pi"), ("e", r"\pi")],
    "complex": [("3+4i", "3-4i"), ("i", "-i"), ("i", "1")],
    "trigonometry": [(r"\sin 30^\circ", r"\sin 30"), (r"\sin x", r"\cos x"), (r"\tan x", r"\tan y")],
    "sets and lists": [
        (r"\{1,2\}", "(1,2)"), (r"\{1,2\}", r"\{1,2,3\}"), ("1, 2", "12"), ("1 or 2", "1"), (r"\pm 5", "5"),
        (r"\emptyset", "0"), ("2, 3", "3, 4"), ("(1,2)", "(1,2,3)"), ("(1,2)", "1,2"),
        ("2,5,100", "2, 5100"), ("10,20,300", "10, 20300"), ("50,100,200", "50, 100, 200"), ("1234,567", "1234567"),
    ],
    "intervals": [
        ("[0,1)", "[0,1]"), ("(0,1)", "(1,0)"), ("x > 3", r"x \ge 3"), ("x > 3", "x < 3"), (r"(3,\infty)",
        r"(-\infty,3)"),
        (r"[0,1]\cup[2,3]", "[0,3]"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    ],
    "equations": [("x^2+y^2=25", "x^2+y^2=5"), ("x^2+y^2=25", "x^2-y^2=25"), ("y=2x+1", "y=2x-1")],
    "choices": [("A", "B"), ("(A)", "(C)"), ("A, C", "A"), ("A", "a long story"), ("B", "8")],
    "words": [
        ("yes", "no"), ("yes", "1"), ("Paris", "London"), ("even", "odd"), ("true", "false"), ("no solution", "0"),
        ("the sum of 3 and 4 is 7", "7"), ("The answer should be 70, I think", "70"), ("seven", "7"), ("north", "n"),
        ("infinitely many", r"\infty"), ("3:20", "3.2"), ("3:2", "2:3"),
    ],
    "decimals": [("0.5", "0.05"), ("1.5", "15"), ("2.0001", "2"), ("0.1", "0.10001")],
    "science": [(r"6.02 \times 10^{23}", r"6.02 \times 10^{22}"), ("10^{-3}", "10^3"), ("1e3", "13")],
    "symbolic": [
        (r"\frac{x}{x+1}", r"1+\frac{1}{x+1}"), (r"\sin 2x", r"2\sin x"), (r"\log_2 8", r"\log_8 2"), (r"\sqrt{x^2}",
        "x"),
        (r"\sqrt{3+2\sqrt2}", r"1-\sqrt2"), (r"|x|", "x"), (r"\sqrt{2+\sqrt3}", "1.9318516526"), ("a+b", "ab"),
    ],
    "thousands with units": [
        ("1,500 apples", "1, 500"), ("1,500 apples", "1500 pears"), ("1,500", "1, 500 apples"), ("2,300 km", "2, 300"),
        ("1,500 m", "1,500 km"), ("12,500 people", "12, 500"), (r"\$1,000", r"\$1, 000"), ("1,500 and 2", "1, 500, 2"),
    ],
    "multiples": [
        (r"15\text{ million}", "15"), ("5 thousand", "5"), ("2 dozen", "2"), ("3 billion", "3 million"),
        ("2 hundred", "2"), ("4 dozen", "4 hundred"), ("1 million", "1"), ("2 thirds", "2"), ("3 tenths", "3"),
        ("5 million people", "5 people"), (r"\$2 million", r"\$2"), ("1.5 trillion", "1.5"), ("5 squared", "5"),
        ("2 cubed", "2"), ("4 factorial", "4"), ("15 million", "15 billion"), ("3 lakh", "3"),
        ("5 bn", "5"), ("10 mil", "10"), ("5 mn", "5 bn"), ("2 halves", "2"),
    ],
    "dates": [
        ("2024-01-02", "2024-02-01"), ("1/2/2020", "2/4/2020"), ("2024-01-02", "2021"), ("3/4/2021", "6/8/2021"),
        ("2023-12-01", "2022-11-01"), ("10/5/99", "2/1/99"), ("01.02.2020", "02.01.2020"), ("2024/1/2", "1012"),
        ("12-25-2020", "25-12-2020"), ("1/2/2020", "1/4040"),
    ],
    "ranges and scores": [
        ("5-10", "10-15"), ("3-1", "2-0"), ("5-10", "-5"), ("3-1", "2"), ("5 to 10", "10 to 15"), ("4–2", "2–0"),
        ("10-20 cm", "20-30 cm"), ("2-1", "1"), ("1-2-3", "2-1-3"), (r"\$5-\$10", r"\$10-\$15"), ("0-0", "1-1"),
        ("3 - 1", "2 - 0"), ("100 - 200", "200 - 300"), ("2019 - 2021", "2017 - 2019"), ("102-98", "100-96"), 
        ("1990 to 1980", "10"),
        ("20%-30%", "30%-40%"), ("1990-1995", "1985-1990"), ("3:20", "3:02"), ("3 hours 20 minutes", "3"),
        ("1 hour and 30 minutes", "1, 30"), ("5 feet 3 inches", "5"),
    ],
    "tiny values": [
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}"), (r"\ln(1+10^{-14})", r"\ln(1+10^{-15})"), (r"\frac{1}{2004!}", "0"),
        ("10^{-14}", "10^{-15}"), ("10^{-20}", "0"), (r"\sin(10^{-13})", r"\sin(10^{-14})"),
        (r"(\frac{1}{2004!},1)", r"(\frac{1}{2006!},1)"), (r"e^{-40}", r"e^{-41}"), (r"\ln(1+10^{-14})", "0"),
        (r"\{\frac{1}{400!},2\}", r"\{\frac{1}{401!},2\}"), (r"10^{-14}\sin x", r"10^{-15}\sin x"),
        (r"\frac{1}{2^{5000}}", r"\frac{1}{2^{5001}}"), (r"1+\frac{1}{2004!}", "1"),
    ],
    "marks": [
        ("5'", '5"'), ("5'", "5"), ('5"', "5"), ("a'", "a"), ("f'", "f"), ("5'3\"", "5"), ("x'", "x''"), ('"A', "B"),
    ],
    "units of physics": [
        ("500 N", "500 J"), ("12 V", "12 W"), (r"25^\circ C", r"25^\circ F"), ("20 J", "20 kJ"), ("5 m", "5 K"),
        ("60 Hz", "60 s"), ("3 kPa", "3 Pa"), (r"25^\circ C", "25 K"), ("5M", "5"), ("5N", "5"),
    ],
    "unions": [
        (r"x\le-2\text{ or }x\ge3", r"(-\infty,-2)\cup[3,\infty)"), ("x<1 or x>2", "1<x<2"),
        ("x<1 or x>2", "x<1 or x>3"), ("x<1 or x>2", "x<1"), ("x<1 or y>2", r"(-\infty,1)\cup(2,\infty)"),
    ],
    "numerals": [
        ("2516_8", "2516"), ("2516_8", "2516_9"), ("1011_2", "11"), ("1011_2", "1101_2"), ("10_2", "10_3"),
        ("x_{8}", "8"), ("AB_{12}", "AB_{16}"), ("A_{16}", "A"), ("2516_8", "25168"), ("1358", "2516_8"),
    ],
    "arrays": [
        (r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", r"\left[\begin{array}{cc}1&3\\2&4\end{array}\right]"),
    ],
    "lines": [
        ("2x+4y-3=0", r"y=\frac12x+\frac34"), ("x-y=1", "y=x+1"), ("2x+4y-3=0", "2x+4y+3=0"), ("3x+y=7", "7"),
        ("x+y=3", "y=3"), ("x+y=3", "x=3"), ("2x+4y-3=0", r"y=-\frac12x"), ("12+15=27", "10+10=20"), ("5=6", "6=7"),
        ("12 + 15 = 27", "12 + 16 = 28"), ("2+2=5", "5"), ("x=2, y=3", "x+y=5"),
    ],
    "relations": [
        ("x<1", "-x<-1"), (r"x\ne3", "x=3"), (r"x\ne3", r"x\ne4"), ("2x>y", "2x<y"), ("x+y>2", "x+y<2"), ("x<1", "1"),
        (r"x+y\ge2", "x+y>2"), ("-x>-1", "1"), ("a>b", "a<b"), ("2a>b", "2b>a"), (r"x\ne3", "3"), ("n>5", r"n\ge5"),
        (r"0\le 2x<6", "(0,3]"), (r"-3<-x\le 0", "(0,3]"), ("2x>6", "x>6"), ("2x>6", "x<3"),
        ("-x>-1", "x>1"), ("x^2<4", "x<2"), (r"x\ne3", "x>3"),
    ],
    "described sets": [
        (r"\{x\mid x>2\}", r"\{x\mid x<2\}"), (r"\{x\mid x>2\}", r"\{x\mid x\ge2\}"), (r"\mathbb{R}", r"\mathbb{Z}"),
        (r"\{x\mid x>2\}", r"\{2\}"), (r"\mathbb{R}", "R"), (r"\mathbb{R}", r"(0,\infty)"),
        (r"\mathbb{N}", r"\mathbb{Q}"), ("ℝ", "R"), ("ℝ", "ℤ"),
    ],
    "options": [("Option B", "Option C"), ("Option B", "A"), (r"\text{Option 2}", "B"), ("Option A or B", "A")],
    "choose": [(r"{5\choose2}", r"{5\choose3}+1"), (r"{5\choose2}", r"\frac52"), (r"{n\choose2}", r"{n\choose3}"),
        (r"{}^7C_2", r"{}^7C_3"), ("2^5C_2", "10"), (r"{}^7C_2", "7")],
    "repeating decimals": [
        (r"0.\overline3", "0.3"), (r"0.\overline{3}", "0.33"), (r"0.1\overline6", r"0.\overline{16}"),
        (r"0.\overline{9}", "0.9"), (r"0.\overline{12}", r"0.1\overline{2}"), (r"\overline{3}", r"\frac13"),
    ],
    "points": [
        ("(x,y)=(2,3)", "(3,2)"), ("(x,y)=(2,3)", "(x,y)=(3,2)"), (r"\langle1,2,3\rangle", r"\langle1,3,2\rangle"),
        ("(x,y)=(2,3)", "2"), (r"\langle1,2,3\rangle", r"\{1,2,3\}"), ("(x,y)=(2,3)", "[2,3]"), ("(x,y)=(2,3)", "6"),
    ],
    "powers of ten": [
        ("1.5 x 10^-5", "1.5e5"), ("6.02 x 10^23", "6.02"), ("6.02 x 10^23", "6.02 x 10^22"), ("3 x 10^8", "3x"),
        ("1.5 x 10^-5", "1.5"), ("2 x 10", "2 x 10^2"),
    ],
    "reals but for some": [
        (r"\mathbb{R}\setminus\{2\}", r"\mathbb{R}\setminus\{3\}"), (r"\mathbb{R}\setminus\{2\}", r"\mathbb{R}"),
        (r"\mathbb{R}\setminus\{2\}", "2"), (r"\mathbb{R}\setminus\{x\}", r"\mathbb{R}\setminus\{y\}"),
    ],
    "small units": [("15 µm", "15 mm"), ("15 µs", "15 µm"), ("15 µm", "15 m")],
    "operator words": [
        *((f"12 {operation}", "12") for operation in OPERATIONS),
        *((f"12 {operation.split()[0]}", "12") for operation in ("gcd 5", "log 2", "lcm 5", "div 5", "mod 5", "twice")),
        ("12 modulo 5", "5"), ("2^{10} mod 7", "1024"), ("-1 mod 5", "-1"), ("12 mod 5", "12 mod 7"),
        ("5k mod 12", "5k"),
        ("1/2 mod 5", "1/2"), ("12 mod 0", "12"), ("gcd(12, 5)", "12"), ("5 choose 2", "7 choose 2"), ("3 by 4", "4"),
        ("7 over 2", "2"), ("2 times 3", "3"), ("5 choose 2", "2"), ("5 choose 2", "11"),
    ],
    "open ends": [
        ("2 or more", "2"), ("2 or more", "2 or less"), ("2 or more", "2, 3"), ("5 or so", "5"), ("3 or fewer", "3"),
    ],
    "unfinished": [("3.133...", "3.133"), ("27 + 25 + ...", "52"), ("1011_2", "1011")],
}  # fmt: skip

UNREADABLE = [
    "", " ", "?", "...", "$$", "ERR", "err", "[Boxed Answer]", "your answer", r"\text{answer}", r"\frac{3",
    "1}^{27} E[X]",
    "(1, 2", "2)", r"\text{unfinished", "NaN", "null", "{{}", "x" * 2000, "-", r"\_\_\_",
]  # fmt: skip
