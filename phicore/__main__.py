def main() -> None:
    print("phicore")
