// PTX text to kernels: what nvcc and Triton emit for a module, without calls. What it does not know
// is an error.
#include <cctype>
#include <cstdlib>
#include <cstring>

#include "ptx/program.h"

namespace ptx {
namespace {

std::string trim(const std::string& s) {
  const auto first = s.find_first_not_of(" \t\n"), last = s.find_last_not_of(" \t\n");
  return first == std::string::npos ? "" : s.substr(first, last - first + 1);
}

// At every `at` that no bracket encloses.
std::vector<std::string> split(const std::string& s, char at) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (const char c : s) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == at && depth == 0) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  for (std::string& part : parts) part = trim(part);
  return trim(s).empty() ? std::vector<std::string>() : parts;
}
std::vector<std::string> words_of(const std::string& s) {
  std::vector<std::string> words;
  for (std::string& word : split(s, ' ')) {
    if (!word.empty()) words.push_back(word);
  }
  return words;
}
bool starts_with(const std::string& s, const char* prefix) {
  return s.compare(0, std::strlen(prefix), prefix) == 0;
}
std::size_t up_to(std::size_t x, std::size_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// The text without comments and lines of debugging, each line as long as before.
std::string strip(const std::string& text) {
  std::string code;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    std::string line = text.substr(at, end - at);
    line = line.substr(0, line.find("//"));
    const std::string first = trim(line).substr(0, trim(line).find_first_of(" \t"));
    if (first == ".section") break;  // debugging data ends the module
    for (const char* ignored : {".version", ".target", ".address_size", ".loc", ".file"}) {
      if (first == ignored) line.clear();
    }
    for (char& c : line) c = c == '\t' ? ' ' : c;
    code += line + '\n';
    at = end + 1;
  }
  return code;
}

// "name[12]" to its parts; no brackets: one element.
std::pair<std::string, std::size_t> name_and_count(const std::string& declared) {
  const auto bracket = declared.find('[');
  if (bracket == std::string::npos) return {declared, 1};
  return {declared.substr(0, bracket), std::strtoull(&declared[bracket + 1], nullptr, 10)};
}

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(strip(text)) {}

  Kernels parse() {
    while (skip_space()) {
      const std::string head = until("{;");
      if (text_[at_ - 1] == ';') {
        declare(head);
      } else if (head.find(".entry ") != std::string::npos) {
        parse_kernel(head);
      } else if (head.find('=') != std::string::npos) {
        until(";");  // the values of an array, which nothing here may read
      } else {
        fail("neither a kernel nor a variable: '" + head + "'");
      }
    }
    return std::move(kernels_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error("PTX, line " + std::to_string(line_) + ": " + what);
  }
  // Whether there is more.
  bool skip_space() {
    for (; at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_])); ++at_) {
      line_ += text_[at_] == '\n';
    }
    return at_ < text_.size();
  }
  // Up to one of `ends`, which is passed over.
  std::string until(const char* ends) {
    const std::size_t end = text_.find_first_of(ends, at_);
    if (end == std::string::npos) fail("the text ends within a statement");
    std::string s = text_.substr(at_, end - at_);
    for (char& c : s) {
      line_ += c == '\n';
      c = c == '\n' ? ' ' : c;
    }
    at_ = end + 1;
    return trim(s);
  }

  // Shared memory is the launch's, under any name. Other variables have no address here, so that
  // using one is an error.
  void declare(const std::string& statement) {
    if (starts_with(statement, ".reg")) return declare_registers(statement);
    const bool shared = starts_with(statement, ".extern .shared ");
    const bool unused = starts_with(statement, ".global ") || starts_with(statement, ".pragma ");
    if (!shared && !unused) fail("an unknown declaration '" + statement + "'");
    if (shared) symbols_[name_and_count(words_of(statement).back()).first] = kSharedBase;
  }
  void declare_registers(const std::string& statement) {
    const auto type = statement.find('.', 1);
    const std::string names = statement.substr(statement.find(' ', type));
    for (const std::string& name : split(names, ',')) {
      const auto open = name.find('<');
      if (open == std::string::npos) {
        scopes_.back()[name] = kernel_.n_registers++;
        continue;
      }
      const int count = std::atoi(&name[open + 1]);
      for (int i = 0; i < count; ++i) {
        scopes_.back()[name.substr(0, open) + std::to_string(i)] = kernel_.n_registers++;
      }
    }
  }

  void parse_kernel(const std::string& head) {
    kernel_ = Kernel();
    const auto open = head.find('('), close = head.rfind(')');
    kernel_.name = words_of(head.substr(0, open)).back();
    if (open != std::string::npos) {
      for (const std::string& p : split(head.substr(open + 1, close - open - 1), ',')) parameter(p);
    }
    for (const char* bound : {".maxntid ", ".reqntid "}) {
      const auto found = head.find(bound);
      if (found != std::string::npos) {
        kernel_.max_threads = std::atoi(&head[found + std::strlen(bound)]);
      }
    }
    scopes_.assign(1, {{"_", kernel_.n_registers++}});
    constants_.clear(), labels_.clear(), branches_.clear();
    parse_body();
    for (const auto& [index, label] : branches_) {
      if (labels_.count(label) == 0) fail("no label '" + label + "'");
      kernel_.code[index].target = labels_[label];
    }
    instruction("ret");  // also at the end of the text
    kernels_[kernel_.name] = std::move(kernel_);
  }
  // ".param .align 8 .b8 name[248]", or ".param .u64 .ptr .global .align 1 name", whose alignment
  // is what the pointer points to.
  void parameter(const std::string& declared) {
    std::size_t size = 0, align = 0;
    const std::vector<std::string> words = words_of(declared);
    for (std::size_t i = 0; i + 1 < words.size(); ++i) {
      if (words[i] == ".align") {
        align = std::strtoull(words[++i].c_str(), nullptr, 10);
      } else if (std::isdigit(static_cast<unsigned char>(words[i].back()))) {
        size = std::strtoull(&words[i][2], nullptr, 10) / 8;
      }
    }
    if (size == 0) fail("a parameter of unknown type: '" + declared + "'");
    const auto [name, count] = name_and_count(words.back());
    if (align == 0 || declared.find(".ptr ") != std::string::npos) align = size;
    const std::size_t offset = up_to(kernel_.param_bytes, align);
    symbols_[name] = kParamBase + offset;
    kernel_.params.push_back({offset, size * count, align});
    kernel_.param_bytes = offset + size * count;
  }

  void parse_body() {
    while (!scopes_.empty() && skip_space()) {
      if (text_[at_] == '{') {
        ++at_, scopes_.emplace_back();
      } else if (text_[at_] == '}') {
        ++at_, scopes_.pop_back();
      } else if (const std::size_t end = label_end(); end != 0) {
        labels_[text_.substr(at_, end - at_)] = static_cast<int>(kernel_.code.size());
        at_ = end + 1;
      } else {
        statement_line_ = line_;
        const std::string statement = until(";");
        statement[0] == '.' ? declare(statement) : instruction(statement);
      }
    }
    if (!scopes_.empty()) fail("the kernel does not end");
    scopes_.emplace_back();
  }
  // Where the colon of a label is; 0: none is here.
  std::size_t label_end() const {
    std::size_t end = at_;
    while (std::isalnum(static_cast<unsigned char>(text_[end])) || text_[end] == '_' ||
           text_[end] == '$') {
      ++end;
    }
    return text_[end] == ':' && text_[end + 1] != ':' ? end : 0;
  }

  void instruction(std::string statement) {
    Instruction i;
    kernel_.sources.push_back({statement_line_, statement});
    if (statement[0] == '@') {
      const auto space = statement.find(' ');
      i.guard_is = statement[1] != '!';
      const auto first = i.guard_is ? 1 : 2;
      i.guard = find_register(statement.substr(first, space - first));
      if (i.guard < 0) fail("no such predicate: '" + statement + "'");
      statement = trim(statement.substr(space));
    }
    const std::string opcode = statement.substr(0, statement.find(' '));
    const std::string rest = statement.substr(opcode.size());
    std::string form = opcode;
    if (opcode == "bra" || opcode == "bra.uni") {
      branches_.emplace_back(kernel_.code.size(), trim(rest));
    } else {
      form += ' ';
      for (const std::string& text : split(rest, ',')) form += operand(i, text);
      form = trim(form);
    }
    const Form* found = find_form(form);
    if (found == nullptr) fail("unknown form '" + form + "': " + statement);
    i.execute = found->execute;
    i.variant = found->variant;
    ++kernel_.forms[form];
    kernel_.has_async_proxy |= starts_with(opcode, "cp.async.bulk");
    kernel_.code.push_back(i);
  }

  void add(Instruction& i, Operand operand) {
    if (i.n_operands == kMostOperands) fail("too many operands");
    i.operands[static_cast<std::size_t>(i.n_operands++)] = operand;
  }
  // Adds it; its letter in the form.
  std::string operand(Instruction& i, const std::string& s) {
    if (s.empty()) fail("an operand is missing");
    const auto bar = s.find('|');
    if (s[0] == '{') {
      const auto elements = split(s.substr(1, s.size() - 2), ',');
      for (const std::string& element : elements) add(i, value(element));
      return elements.size() == 1 ? "r" : std::to_string(elements.size());
    }
    if (s[0] == '[') {
      const std::string inside = trim(s.substr(1, s.size() - 2));
      const auto plus = inside.find('+');
      add(i, value(trim(inside.substr(0, plus))));
      add(i, plus == std::string::npos ? constant(0) : value(trim(inside.substr(plus + 1))));
      return "m";
    }
    if (bar != std::string::npos) {
      add(i, value(trim(s.substr(0, bar))));
      add(i, value(trim(s.substr(bar + 1))));
      return "p";
    }
    add(i, value(s));
    return "r";
  }

  Operand constant(std::uint64_t bits) {
    const auto [found, is_new] = constants_.emplace(bits, kernel_.constants.size());
    if (is_new) kernel_.constants.push_back(bits);
    return ~static_cast<int>(found->second);
  }
  int find_register(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->find(name); found != scope->end()) return found->second;
    }
    return -1;
  }
  // A register, special register, number or the address of a name.
  Operand value(const std::string& s) {
    if (const int found = find_register(s); found >= 0) return found;
    const auto symbol = symbols_.find(s);
    if (symbol != symbols_.end()) return constant(symbol->second);
    if (s[0] == '%') {
      const auto [found, is_new] = kernel_.specials.emplace(s, kernel_.n_registers);
      kernel_.n_registers += is_new ? 1 : 0;
      return found->second;
    }
    char* end = nullptr;
    std::uint64_t bits = 0;
    if (starts_with(s, "0f") || starts_with(s, "0F") || starts_with(s, "0d") ||
        starts_with(s, "0D")) {
      bits = std::strtoull(&s[2], &end, 16);
    } else if (s.find('.') != std::string::npos) {
      const float x = std::strtof(s.c_str(), &end);
      std::memcpy(&bits, &x, sizeof x);
    } else if (s[0] == '-') {
      bits = static_cast<std::uint64_t>(std::strtoll(s.c_str(), &end, 0));
    } else {
      bits = std::strtoull(s.c_str(), &end, 0);
    }
    if (*end != '\0' || s.empty()) fail("unknown operand '" + s + "'");
    return constant(bits);
  }

  const std::string text_;
  std::size_t at_ = 0;
  int line_ = 1;
  int statement_line_ = 1;
  Kernels kernels_;
  std::map<std::string, std::uint64_t> symbols_;
  // Of the kernel that is being read:
  Kernel kernel_;
  std::vector<std::map<std::string, int>> scopes_;
  std::map<std::string, int> labels_;
  std::map<std::uint64_t, std::size_t> constants_;
  std::vector<std::pair<std::size_t, std::string>> branches_;
};

}  // namespace

Kernels parse(const std::string& text) { return Parser(text).parse(); }

}  // namespace ptx
