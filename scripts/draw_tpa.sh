#!/usr/bin/env bash
# Draws doc/tpa.svg: how the factors of one token make its heads, and what is cached of them. The sizes are those of the
# paper's 124M model. Boxes are drawn to scale within their row, except that a rank is drawn four times as wide.
#   scripts/draw_tpa.sh [FILE]                                  # default: doc/tpa.svg
#   scripts/draw_tpa.sh /dev/stdout | cmp - doc/tpa.svg         # is the committed picture up to date?
set -euo pipefail
export LC_ALL=C       # a decimal point, whatever the language
cd "$(dirname "$0")/.."

awk -v C=768 -v NH=34 -v HS=64 -v RQ=6 -v RK=2 -v RV=2 '
# (x, y) is the upper left corner.
function box(x, y, w, h, fill) {
    printf "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\" stroke=\"#444\"/>\n",
           x, y, w, h, fill
}
function line(x1, y1, x2, y2, style) {
    printf "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" class=\"%s\"/>\n", x1, y1, x2, y2, style
}
# anchor: start, middle or end of the text is at x. style: name or note.
function words(x, y, anchor, style, s) {
    printf "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" class=\"%s\"\n>%s</text>\n", x, y, anchor, style, s
}
# s with a subscript; then, `space` pixels on and back on the line, the rest.
function lower(s, subscript, rest, space) {
    s = s "<tspan\nclass=\"sub\" dy=\"4\">" subscript "</tspan>"
    return rest == "" ? s : s "<tspan dx=\"" space + 0 "\" dy=\"-4\">" rest "</tspan>"
}

# A part of the factor row, `count` numbers wide. Returns where the next part begins.
function factor(x, count, fill, name, index_, shape,    w) {
    w = count * ROW_SCALE
    box(x, ROW_Y, w, ROW_H, fill)
    words(x + w / 2, ROW_Y + 16, "middle", "name", lower(name, index_))
    words(x + w / 2, ROW_Y + 33, "middle", "note", shape)
    return x + w
}

# One of q, k and v as a product of matrices, (NH x R) (R x HS) = (NH x HS). from: the middle of its factors in the
# factor row. Returns its right edge.
function heads(x, from, R, letter, factor_b,    h, w, thick, b_x, b_y, out_x, y, i) {
    h = NH * UNIT; w = HS * UNIT; thick = R * RANK * UNIT; y = HEADS_Y
    b_x = x + thick + 20; b_y = y + (h - thick) / 2; out_x = b_x + w + 26
    line(from, ROW_Y + ROW_H + 4, (x + out_x + w) / 2, y - 42, "arrow")
    words((x + out_x + w) / 2, y - 20, "middle", "name",
          lower(letter " = 1/" R " &#931;", "r", "a", 5) lower("", "r", "&#8855;", 5)\
          "<tspan\ndx=\"5\">" factor_b "</tspan>")
    box(x, y, thick, h, A)
    box(b_x, b_y, w, thick, B)
    for (i = 1; i < R; i++) {
        line(x + i * RANK * UNIT, y, x + i * RANK * UNIT, y + h, "thin")
        line(b_x, b_y + i * RANK * UNIT, b_x + w, b_y + i * RANK * UNIT, "thin")
    }
    box(out_x, y, w, h, FULL)
    words(x + thick + 10, y + h / 2 + 5, "middle", "name", "&#215;")
    words(b_x + w + 13, y + h / 2 + 5, "middle", "name", "=")
    words(out_x + w / 2, y + h / 2 + 5, "middle", "name", letter)
    words(x + thick / 2, y + h + 18, "middle", "note", NH " &#215; " R)
    words(b_x + w / 2, y + h + 18, "middle", "note", R " &#215; " HS)
    words(out_x + w / 2, y + h + 18, "middle", "note", NH " heads &#215; " HS)
    return out_x + w
}

BEGIN {
    A = "#f5c26b"; B = "#8fbfe8"; FULL = "#e9e9e9"      # head factors, token factors, whole heads
    WIDTH = 940; LEFT = 22; RIGHT = WIDTH - LEFT
    ROW_X = 160; ROW_Y = 40; ROW_H = 42; ROW_SCALE = (RIGHT - ROW_X) / ((RQ + RK + RV) * (NH + HS))
    HEADS_Y = 176; UNIT = 1.6; RANK = 4                 # UNIT: pixels of a number
    cached = (RK + RV) * (NH + HS); whole = 2 * NH * HS
    HEIGHT = HEADS_Y + NH * UNIT + 192

    printf "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" role=\"img\">\n",
           WIDTH, HEIGHT, WIDTH, HEIGHT
    print "<!-- drawn by scripts/draw_tpa.sh -->"
    print "<title>How the factors of one token make its heads, and what is cached of them</title>"
    print "<style>text { font-family: Helvetica, Arial, \"DejaVu Sans\", sans-serif; fill: #111 }"
    print ".name { font-size: 15px } .note { font-size: 12.5px; fill: #333 } .sub { font-size: 11px }"
    print ".arrow { stroke: #444; stroke-width: 1.4; marker-end: url(#tip) } .thin { stroke: #444; stroke-width: 0.6 }"
    print ".rule { stroke: #999; stroke-dasharray: 3 3 } .mark { stroke: #2e7d32; stroke-width: 3 }"
    print ".green { font-size: 12.5px; fill: #2e7d32 }</style>"
    print "<defs><marker id=\"tip\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"8\" markerHeight=\"8\""
    print "orient=\"auto\"><path d=\"M0 0L8 4L0 8z\" fill=\"#444\"/></marker></defs>"
    printf "<rect width=\"%d\" height=\"%d\" rx=\"8\" fill=\"#fff\"/>\n", WIDTH, HEIGHT

    # A token and its row of factors
    words(LEFT, ROW_Y + 16, "start", "name", "one token")
    words(LEFT, ROW_Y + 33, "start", "note", C " numbers")
    line(LEFT + 88, ROW_Y + ROW_H / 2, ROW_X - 5, ROW_Y + ROW_H / 2, "arrow")
    words(ROW_X, ROW_Y - 12, "start", "note", "one matrix product: all factors, " (RQ + RK + RV) * (NH + HS) " numbers")
    k_x = factor(factor(ROW_X, RQ * NH, A, "a", "Q", NH " &#215; " RQ), RQ * HS, B, "b", "Q", RQ " &#215; " HS)
    v_x = factor(factor(k_x, RK * NH, A, "a", "K", NH " &#215; " RK), RK * HS, B, "b", "K", RK " &#215; " HS)
    factor(factor(v_x, RV * NH, A, "a", "V", NH " &#215; " RV), RV * HS, B, "b", "V", RV " &#215; " HS)
    line(k_x, ROW_Y - 5, RIGHT, ROW_Y - 5, "mark")
    words((k_x + RIGHT) / 2, ROW_Y - 12, "middle", "green", "cached: " cached " numbers")

    # Factors to heads
    gap = (RIGHT - LEFT - 6 * HS * UNIT - (RQ + RK + RV) * RANK * UNIT - 3 * 46) / 2
    x = heads(LEFT, (ROW_X + k_x) / 2, RQ, "q", lower("rope(b", "r", ")"))
    x = heads(x + gap, (k_x + v_x) / 2, RK, "k", lower("rope(b", "r", ")"))
    heads(x + gap, (v_x + RIGHT) / 2, RV, "v", lower("b", "r"))
    y = HEADS_Y + NH * UNIT + 52
    words(WIDTH / 2, y, "middle", "name", 
          "then, for each head, softmax(q&#183;k / &#8730;" HS ") v as in any transformer")

    # What is cached, next to multi-head attention
    y += 18; line(LEFT, y, RIGHT, y, "rule")
    y += 26; words(LEFT, y, "start", "name", "KV cache of one token in one layer, to scale")
    y += 13; x = LEFT; scale = (RIGHT - LEFT) / whole
    for (i = 0; i < 2; i++) {
        R = i ? RV : RK
        box(x, y, R * NH * scale, 30, A); x += R * NH * scale
        box(x, y, R * HS * scale, 30, B); x += R * HS * scale
    }
    words(x + 10, y + 20, "start", "name",
          "TPA: the factors of k and v, " cached " numbers. Decoding reads them as they are.")
    y += 40; box(LEFT, y, whole * scale, 30, FULL)
    words(LEFT + 10, y + 20, "start", "name", "MHA with the same " NH " heads: k and v, " whole " numbers")
    print "</svg>"
}' >"${1:-doc/tpa.svg}"
