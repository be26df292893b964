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
        ["1000000", "1,000,000", r"1{,}000{,}000", "10^6", "10^{6}", "1e6"],
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
    "spacing": [("(2,3)", "(3,2)"), ("(2,3)", "[2,3]"), ("5x+1", "5(x+1)"), ("2x", "x^2")],
    "units": [
        ("5 cm", "5 m"), ("50%", "0.5"), ("60°", "60 cm"), (r"\$5", "5 euros"), ("5 m", "5 m^2"), ("3 hours",
        "3 minutes"),
        ("5 cm", "6 cm"), ("5 mod 12", "5 mod 7"), ("30 km/h", "30 mph"), ("12 apples", "12 pears"),
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
    "unfinished": [("3.133...", "3.133"), ("27 + 25 + ...", "52"), ("1011_2", "1011")],
}  # fmt: skip

UNREADABLE = [
    "", " ", "?", "...", "$$", "ERR", "err", "[Boxed Answer]", "your answer", r"\text{answer}", r"\frac{3",
    "1}^{27} E[X]",
    "(1, 2", "2)", r"\text{unfinished", "NaN", "null", "{{}", "x" * 2000, "-", r"\_\_\_",
]  # fmt: skip
