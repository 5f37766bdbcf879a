"""The report's fields under the names that others look for: the mechanism, and which field serves which article.

`disclosure` follows the groups of the Differential Privacy Deployments Registry (arXiv 2509.13509): deployment, flavour
and privacy loss, model, accounting, implementation; its last group is what the lower layers of NIST SP 800-226's pyramid
ask for. `articles` makes no legal claim. Both are pairs of English and Chinese text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from privacy.contract import Contract

Row = tuple[str, str, str, str, str, str]  # field, its name in English and Chinese, its value in both, claims


def disclosure(report: dict[str, Any], agreed: Contract) -> list[dict[str, Any]]:
    """Groups of fields, in the registry's order. report: all other facts. Without privacy no group names a parameter."""
    private, hidden = report["private"], report["secure_aggregation"]
    groups: list[tuple[str, str, str, Iterator[Row]]] = [("deployment", "Deployment", "部署", _deployment(report))]
    if private:
        groups.append(("privacy_loss", "Privacy flavour and loss", "隐私定义与损失", _loss(report["budget"])))
    groups.append(("model", "Model of trust", "信任模型", _model(report["contract"], private, hidden)))
    if private:
        groups.append(("accounting", "Accounting", "核算", _accounting(report)))
    groups += [("implementation", "Implementation", "实现", _implementation(report, agreed)),
               ("sp800_226", "Below the mechanism (NIST SP 800-226)", "机制之下的各层（NIST SP 800-226）", _beneath(report))]
    keys = ("field", "name", "name_zh", "en", "zh", "claim")
    return [{"group": key, "en": en, "zh": zh, "fields": [dict(zip(keys, row, strict=True)) for row in rows]}
            for key, en, zh, rows in groups]


def _deployment(report: dict[str, Any]) -> Iterator[Row]:
    c, r = report["contract"], report["rounds"]
    curators = ", ".join(dict.fromkeys(a["organisation"] for a in report["approvals"]))
    yield "data_curators", "Data curators", "数据管理方", curators, "", ""
    yield "intended_use", "Intended use", "预期用途", c["purpose"], "", ""
    yield ("data_product", "Product", "数据产品", *((
        f"one adapter of a language model and its head, {c['labels']} labels",
        f"一个语言模型的适配器及其分类头，{c['labels']} 个标签") if c["labels"] else (
        "one adapter of a language model that generates text", "一个生成文本的语言模型的适配器")), "")
    yield "base_model", "Base model", "基础模型摘要", c["model"], "", ""
    yield ("rounds", "Rounds", "轮数",
           f"{r['done']} done, void attempts: {r['void']}, planned: {r['planned']}, retries paid for: {r['retries']}",
           f"完成 {r['done']}，作废 {r['void']} 次，计划 {r['planned']}，已预留的重试 {r['retries']}", "")
    yield ("sums", "Sums", "总和", f"rounds with all {c['sites']} sites: {r['full']}, with fewer: {r['partial']}",
           f"全部机构参与的轮数：{r['full']}，部分机构参与：{r['partial']}", "")


def _loss(b: dict[str, Any]) -> Iterator[Row]:
    one, one_zh = ("person, with all its records", "个人及其全部记录") if b["unit"] == "person" else ("record", "单条记录")
    yield "flavor", "Flavour", "定义", "approximate: (epsilon, delta)", "近似差分隐私：(epsilon, delta)", ""
    yield "privacy_unit", "Unit", "保护单位", one, one_zh, "C1"
    yield "neighbours", "Neighbours", "相邻关系", "add or remove one", "增加或删除一个", "C1"
    yield ("privacy_parameters", "Parameters", "隐私参数",
           f"epsilon {b['epsilon']} allowed for this run, at the delta of each site (below)",
           f"本次运行允许的 epsilon 为 {b['epsilon']}，delta 见下表各机构", "C1")
    yield ("unprotected", "Not protected", "不受保护的量",
           "declared sizes (one significant digit), who took part, dropouts, refusals, number of rounds",
           "申报数量（一位有效数字）、参与者、退出、拒绝、轮数", "")


def _model(c: dict[str, Any], private: bool, hidden: bool) -> Iterator[Row]:
    yield ("actors", "Actors", "参与方", f"one coordinator, which isn't trusted; {c['sites']} sites, which don't trust each "
           "other; the engineer who signed", f"一个不受信任的协调方；{c['sites']} 个互不信任的机构；签署合约的工程师", "")
    if private:
        yield ("trust", "Trust", "信任", "local to each site: its own noise protects it, whatever the others do",
               "各机构自担：由自身噪声保护，与其他各方的行为无关", "C1")
    else:
        yield "trust", "Trust", "信任", "no differential privacy", "无差分隐私", ""
    yield ("release", "Release", "发布方式", "not interactive; the adapter after every round goes to all sites" +
           (", and every round is charged" if private else ""),
           "非交互式；每轮之后的适配器发送给所有机构" + ("，每轮均计入消耗" if private else ""), "")
    yield ("secure_aggregation", "Secure aggregation", "安全聚合",
           f"{c['suite']}, threshold {c['threshold']}, least sum {c['survivors']} sites" if hidden else "off",
           "" if hidden else "未启用", "C2" if hidden else "")


def _accounting(report: dict[str, Any]) -> Iterator[Row]:
    yield ("composition", "Composition", "合成", "privacy loss distributions, recomputed while this report was made; "
           "rounded up; every reserved round counts, done or not",
           "隐私损失分布，生成本报告时重新计算；向上取整；凡预留的轮次均计入，无论是否完成", "C1 C7")
    yield ("post_processing", "Post-processing", "后处理", f"sums over sites, the rule {report['contract']['rule']} and the "
           f"server's optimiser {report['contract']['optimizer']}", "机构间求和、聚合规则与服务端优化器", "")
    yield ("amplification", "Not claimed", "未采用", "amplification by sampling of sites, or by secure aggregation",
           "机构抽样放大、安全聚合放大", "")
    yield ("overlap", "Across sites", "跨机构",
           "accounted as if each site were alone; who has records at two sites adds up both",
           "按各机构单独核算；在两个机构都有记录者须两者相加", "")


def _implementation(report: dict[str, Any], agreed: Contract) -> Iterator[Row]:
    if report["private"]:
        b = report["budget"]
        phases = f" (the first of {b['phases']} phases)" if b["phases"] > 1 else ""
        draws = f", the mean over at most {b['draws']} of its records" if b["draws"] > 1 else ""
        owned = f"; a person owns at most {b['k_max']} of them" if b["k_max"] else ""
        unit_zh = {"person": "每个人", "record": "每条记录"}[b["sampled"]]
        more_zh = (f"（{b['phases']} 个阶段中的第一阶段）" if b["phases"] > 1 else "") + (
            f"，取其至多 {b['draws']} 条记录的平均" if b["draws"] > 1 else "") + (
            f"，每人至多 {b['k_max']} 条" if b["k_max"] else "")
        yield ("mechanism", "Mechanism", "机制", "Gaussian noise on the clipped sum of a Poisson sample: each "
               f"{b['sampled']} is drawn with probability q = {b['q']}{phases}, its gradient clipped to norm {b['clip']}"
               f"{draws}{owned}; {b['steps']} such steps a round",
               f"对泊松抽样后裁剪求和的结果加高斯噪声：{unit_zh}以 q = {b['q']} 的概率被抽中{more_zh}，梯度裁剪至范数 "
               f"{b['clip']}；每轮 {b['steps']} 步", "C1")
        yield ("arithmetic", "Arithmetic", "数值", "sums and noise on an integer lattice; noise from the operating system's "
               "generator", "求和与噪声均在整数格上；噪声取自操作系统的随机源", "C1")
    else:
        yield "mechanism", "Noise", "噪声", "none", "无", ""
    reasons = "; ".join(f"{s.body}: {s.reference}" for s in agreed.sign_off)
    yield ("justification", "Who justified the purpose", "用途的依据", reasons or "no sign-off is recorded",
           "" if reasons else "无审批记录", "")
    counted, counted_zh = ("; earlier jobs on the same data count in its ledger's total",
                           "；同一数据的早期任务计入其账本累计值") if report["private"] else ("", "")
    yield ("pre_processing", "Preparation and tuning", "预处理与调参",
           f"what a site did before the run isn't part of this evidence{counted}",
           f"机构在运行之前所做的处理不在本证据之内{counted_zh}", "")


def _beneath(report: dict[str, Any]) -> Iterator[Row]:
    metrics = ", ".join(report["contract"]["metrics"])
    yield ("utility", "Utility and bias", "效用与偏差",
           f"{metrics} on a public split, as the coordinator states; no figure for groups of people",
           f"公开数据集上的 {metrics}，由协调方声明；没有分人群的数字", "")
    yield ("security", "Security", "安全", "the sites' machines are taken to be sound; timing isn't covered",
           "假定各机构的机器未被攻破；不涵盖时间特征", "")
    yield ("collection", "Data collection", "数据采集",
           "records stay at their site; how they were collected isn't part of this evidence",
           "记录留在各机构；其采集方式不在本证据之内", "C3" if report["private"] else "")


_GDPR, _HIPAA, _AI, _PIPL, _DSL = "GDPR", "HIPAA", "EU AI Act", "PIPL 个人信息保护法", "数据安全法 (DSL)"
ARTICLES: tuple[tuple[str, str, str, dict[str, str]], ...] = (  # JSON field; its name; law -> article
    ("contract.purpose", "Purpose, sign-offs, expiry", "用途、审批、有效期", {
        _GDPR: "30(1)(b), 35(7)(a)", _AI: "11, Annex IV", _PIPL: "55, 56(1)", _DSL: "27"}),
    ("contract.fields", "Kinds of data", "数据种类", {_GDPR: "30(1)(c)", _AI: "10", _PIPL: "55", _DSL: "27"}),
    ("approvals", "Who approved, when, under which policy", "批准人、时间、所依策略", {
        _GDPR: "5(2), 30(1)(a)", _HIPAA: "164.316(b)(1)", _AI: "26", _PIPL: "51, 55", _DSL: "27"}),
    ("budget", "Unit, epsilon, delta, spent and remaining", "保护单位、epsilon、delta、已用与剩余", {
        _GDPR: "30(1)(g), 35(7)(d)", _HIPAA: "164.308(a)(1)(ii)(A)", _AI: "15", _PIPL: "56(3)", _DSL: "27, 30"}),
    ("odds", "Odds in plain words, trade-off curve", "通俗几率、权衡曲线", {
        _GDPR: "35(7)(c)", _HIPAA: "164.308(a)(1)(ii)(A)", _PIPL: "56(2)", _DSL: "30"}),
    ("disclosure", "Mechanism and technical measures", "机制与技术措施", {
        _GDPR: "30(1)(g), 32", _HIPAA: "164.312", _AI: "11, Annex IV", _PIPL: "51, 56(3)", _DSL: "27"}),
    ("rounds", "Rounds and signed statements", "轮次与签名声明", {
        _GDPR: "5(2)", _HIPAA: "164.312(b)", _AI: "12, 19", _PIPL: "55", _DSL: "27"}),
    ("log", "Transparency log and its witnesses", "透明日志及其见证方", {
        _HIPAA: "164.312(b), (c)(1)", _AI: "12, 19", _DSL: "27"}),
    ("incidents", "Incidents, dropouts, refusals", "事件、退出、拒绝", {
        _HIPAA: "164.308(a)(1)(ii)(D), (a)(6)(ii)", _AI: "12, 26", _DSL: "29"}),
    ("evaluations", "Public metric by round", "各轮公开指标", {_AI: "15"}),
)
LAWS = (_GDPR, _HIPAA, _AI, _PIPL, _DSL)


def articles(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Which field of this report may serve which record-keeping duty; only fields that it has."""
    def there(path: str) -> bool:
        value: Any = report
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value not in (None, [])

    return [{"field": path, "en": en, "zh": zh, "articles": [{"law": law, "article": found.get(law, "")} for law in LAWS]}
            for path, en, zh, found in ARTICLES if there(path)]
