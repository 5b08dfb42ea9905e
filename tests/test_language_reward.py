"""The reward for staying in one language."""

from __future__ import annotations

import pytest
from conftest import gold_replies
from pydantic import ValidationError

from qreason.rewards import registry
from qreason.rewards.language import SCRIPTS_OF, detector
from qreason.types import Example, Reply

PARAGRAPHS = {
    "en": (
        "The print queue has been stuck since this morning. I looked at the log of the server and found that the "
        "spooler could not write to its folder, because the disk was full. After the old files had been deleted, "
        "the service started again and every user was able to print."
    ),
    "de": (
        "Die Druckwarteschlange hängt seit heute Morgen. Im Protokoll des Servers stand, dass der Dienst nicht in "
        "seinen Ordner schreiben konnte, weil die Festplatte voll war. Nachdem die alten Dateien gelöscht waren, "
        "startete der Dienst wieder und alle Benutzer konnten drucken."
    ),
    "fr": (
        "La file d'impression est bloquée depuis ce matin. J'ai lu le journal du serveur et constaté que le service "
        "ne pouvait plus écrire dans son dossier, car le disque était plein. Une fois les anciens fichiers supprimés, "
        "le service a redémarré et tous les utilisateurs ont pu imprimer."
    ),
    "es": (
        "La cola de impresión está bloqueada desde esta mañana. Revisé el registro del servidor y vi que el servicio "
        "no podía escribir en su carpeta porque el disco estaba lleno. Después de borrar los archivos antiguos, el "
        "servicio arrancó de nuevo y todos los usuarios pudieron imprimir."
    ),
    "ru": (
        "Очередь печати зависла сегодня утром. В журнале сервера было видно, что служба не может писать в свою папку, "
        "потому что диск заполнен. После удаления старых файлов служба снова запустилась, и все пользователи смогли "
        "печатать."
    ),
    "zh": (
        "打印队列从今天早上开始一直卡住。我查看了服务器的日志，发现服务无法写入自己的文件夹，因为磁盘已满。"
        "删除旧文件之后，服务重新启动，所有用户都可以正常打印了。"
    ),
    "ja": (
        "今朝から印刷キューが止まっています。サーバーのログを確認したところ、ディスクがいっぱいでサービスが"
        "フォルダーに書き込めないことが分かりました。古いファイルを削除すると、サービスは再び起動しました。"
    ),
    "ko": (
        "오늘 아침부터 인쇄 대기열이 멈춰 있습니다. 서버 로그를 확인해 보니 디스크가 가득 차서 서비스가 폴더에 "
        "쓸 수 없었습니다. 오래된 파일을 삭제한 뒤에 서비스가 다시 시작되었고 모든 사용자가 인쇄할 수 있었습니다."
    ),
    "ar": (
        "توقفت قائمة انتظار الطباعة منذ صباح اليوم. راجعت سجل الخادم ووجدت أن الخدمة لا تستطيع الكتابة في مجلدها، "
        "لأن القرص ممتلئ. بعد حذف الملفات القديمة عادت الخدمة إلى العمل وتمكن جميع المستخدمين من الطباعة."
    ),
    "hi": (
        "आज सुबह से प्रिंट कतार अटकी हुई है। मैंने सर्वर का लॉग देखा और पाया कि सेवा अपने फ़ोल्डर में लिख नहीं पा रही थी, "
        "क्योंकि डिस्क भर गई थी। पुरानी फ़ाइलें हटाने के बाद सेवा फिर से शुरू हो गई।"
    ),
}


def share(text: str, language: str = "en") -> float | None:
    (value,) = registry.REWARDS["language_consistency"]([Reply(text)], [Example("x", "issue", "")], language=language)
    return value


def judged(text: str, language: str = "en") -> float:
    """The share of a text that has words."""
    value = share(text, language)
    assert value is not None
    return value


def reply(reasoning: str, answer: str) -> str:
    return f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"


def test_gold_replies_are_in_english() -> None:
    replies, examples = gold_replies()
    marks = [value or 0.0 for value in registry.REWARDS["language_consistency"](replies, examples)]
    assert len(marks) == 1500
    assert sum(marks) / len(marks) >= 0.98
    assert marks.count(1.0) / len(marks) >= 0.97


@pytest.mark.parametrize("language", PARAGRAPHS)
def test_paragraph_is_in_its_own_language(language: str) -> None:
    assert judged(PARAGRAPHS[language], language) >= 0.95


@pytest.mark.parametrize("language", sorted(set(PARAGRAPHS) - {"en"}))
def test_paragraph_of_another_language_is_not_english(language: str) -> None:
    assert judged(PARAGRAPHS[language]) <= 0.1
    assert judged(PARAGRAPHS["en"], language) <= 0.1


@pytest.mark.parametrize("language", ["de", "fr", "es", "ru", "zh"])
def test_half_english_reply_earns_about_half(language: str) -> None:
    for text in (
        reply(PARAGRAPHS["en"], PARAGRAPHS[language]),
        reply(PARAGRAPHS[language], PARAGRAPHS["en"]),
    ):
        assert 0.3 <= judged(text) <= 0.7


def test_sentences_taking_turns_are_told_apart() -> None:
    pairs = zip(PARAGRAPHS["en"].split(". "), PARAGRAPHS["de"].split(". "), strict=True)
    assert 0.3 <= judged(". ".join(sentence for pair in pairs for sentence in pair)) <= 0.7


@pytest.mark.parametrize(
    "text",
    [
        "DNS resolver IP 10.0.0.1 SERVFAIL port 53, chkdsk /f",
        "Run `netsh winsock reset` and `ipconfig /flushdns`, then gpupdate /force.",
        "Reset the Kerberos keytab on srv-db-01 and purge tickets via klist purge -li 0x3e7.",
        "sudo systemctl restart nginx.service && journalctl -u nginx",
        "VPN, DNS, MFA, SSO, LDAP and SAML",
        "Ping Telnet Nmap Tracert Netstat Route Arp",
        "RESTART THE SERVER NOW AND CHECK THE LOGS",
        "The user's résumé won't print from C:\\Users\\müller\\Dokumente.",
        "Set the delay to 5 µs, so that Δt is about π.",
        "Restart.",
    ],
)
def test_technical_english_is_english(text: str) -> None:
    assert share(reply("", text)) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "DER SERVER IST NICHT ERREICHBAR UND MUSS NEU GESTARTET WERDEN",
        "Das Outlook-Profil löschen, das Konto neu hinzufügen und das Senden testen.",
        "¿Has probado a reiniciar el router?",
        "请重启服务器",
        "ПЕРЕЗАГРУЗИТЕ СЕРВЕР",
        "Neustart erforderlich.",
    ],
)
def test_short_or_shouted_text_of_another_language_is_not_english(text: str) -> None:
    assert share(text) == 0.0


def test_clause_too_short_to_tell_goes_with_its_neighbour() -> None:
    assert share("Neustart erforderlich: restart the server and read the log of the spooler.") == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "\uff32\uff45\uff53\uff45\uff54",
        "re\u00adstart",
        "The user cannot find his re\u0301sume\u0301 on the server",
        "re\u200bset",
    ],
)
def test_other_ways_to_write_a_letter_change_nothing(text: str) -> None:
    assert share(text) == 1.0


def test_every_ideograph_is_a_word_and_acronyms_are_none() -> None:
    assert share("请重启DNS服务器 10.0.0.1，restart it") == 2 / 8
    assert share("请重启DNS服务器 10.0.0.1，restart it", "zh") == 6 / 8


def test_technical_german_is_german() -> None:
    text = "Starten Sie den Exchange-Server neu und prüfen Sie das Windows Event Log im Admin Center."
    assert share(text, "de") == 1.0


@pytest.mark.parametrize("text", ["", "  \n", reply("", ""), "<answer>42</answer>", "10.0.0.1 / 443", "A = b", "DNS"])
def test_reply_without_words_is_not_judged(text: str) -> None:
    assert share(text) is None


def test_unknown_language_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown language 'english'; known are .*\bde, .*\ben, .*\bzh"):
        share("Restart it.", "english")
    with pytest.raises(ValidationError, match="unknown language 'english'"):
        registry.settings_model("language_consistency").model_validate({"language": "english"})


def test_every_language_with_its_own_script_is_known_to_the_detector() -> None:
    assert set(SCRIPTS_OF) <= set(detector().labels)
