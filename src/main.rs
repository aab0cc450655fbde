fn main() {

}
